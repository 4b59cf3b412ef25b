"""`vllm serve`: the fastest for many requests; it needs a GPU."""

from __future__ import annotations

import shutil

from steep.runtime.device import choose_device
from steep.serving.served_model import LOOPBACK, ServedModel

READY = "/health"
"""The path that answers with 200 once the model is loaded."""


def why_not(model: ServedModel) -> str | None:
    """Why it cannot serve the model here; None if it can."""
    if model.gguf is not None:
        return "it serves folders, and this is a .gguf file"
    if shutil.which("vllm") is None:
        return "not installed: pip install vllm"
    return None if choose_device("auto").type == "cuda" else "it needs a GPU"


def command(model: ServedModel, port: int) -> list[str]:
    """The command line that serves the model on loopback."""
    return ["vllm", "serve", str(model.folder), "--host", LOOPBACK, "--port", str(port)]
