"""llama.cpp: a .gguf file, quick on CPUs. Its own `llama-server`, else the server of llama-cpp-python.

The latter may be in another interpreter, which $STEEP_LLAMA_CPP_PYTHON names, as for the verification of an export.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

from steep.core.child import python_command
from steep.serving.served_model import LOOPBACK, ServedModel

READY = "/v1/models"
"""The path that answers with 200 once the model is loaded."""


def why_not(model: ServedModel) -> str | None:
    """Why it cannot serve the model here; None if it can."""
    if model.gguf is None:
        return "it serves .gguf files: steep export RUN --to gguf makes one"
    if shutil.which("llama-server") or _interpreter() is not None:
        return None
    return "neither llama-server nor llama-cpp-python[server] is installed: pip install 'llama-cpp-python[server]'"


def command(model: ServedModel, port: int) -> list[str]:
    """The command line that serves the model on loopback."""
    own = shutil.which("llama-server")
    start = [own] if own else python_command("llama_cpp.server", python=str(_interpreter()))
    return [*start, "--model", str(model.gguf), "--host", LOOPBACK, "--port", str(port)]


def _interpreter() -> str | None:
    """A Python interpreter that has the server of llama-cpp-python, found without importing it."""
    named = os.environ.get("STEEP_LLAMA_CPP_PYTHON")
    if named is None:
        found = all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "starlette_context"))
        return sys.executable if found else None
    probe = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('llama_cpp', 'starlette_context'))))"
    try:
        done = subprocess.run([named, "-c", probe], capture_output=True, check=False)
    except OSError:
        return None
    return named if done.returncode == 0 else None
