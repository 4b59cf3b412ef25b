"""`transformers serve`: any folder that transformers loads, on a CPU or a GPU. Extra `serve`.

Weakness: one request at a time, and chat only for models with a chat template; others have the completions endpoint.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from steep.serving.served_model import LOOPBACK, ServedModel

PACKAGES = ("fastapi", "uvicorn", "openai")
READY = "/health"
"""The path that answers with 200 once the model is loaded."""


def why_not(model: ServedModel) -> str | None:
    """Why it cannot serve the model here; None if it can."""
    if model.gguf is not None:
        return "it serves folders, and this is a .gguf file"
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} not installed: pip install 'steep[serve]'"
    return None


def command(model: ServedModel, port: int) -> list[str]:
    """The command line that serves the model on loopback."""
    program = str(Path(sys.executable).with_name("transformers"))
    return [program, "serve", str(model.folder), "--host", LOOPBACK, "--port", str(port)]
