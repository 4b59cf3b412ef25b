"""What a run ran on: versions, machine, git state. No torch unless it is already imported."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from importlib import metadata
from typing import Any

from steep import __version__
from steep.runtime.device import available_cores, cpu_name, total_memory_bytes

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "pyarrow")


def describe_environment(command: list[str]) -> dict[str, Any]:
    """Versions and machine as JSON values, for environment.json and the report. command: without secrets."""
    torch = sys.modules.get("torch")
    return {
        "steep": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_bytes": total_memory_bytes("cpu"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else [],
        "threads": torch.get_num_threads() if torch else None,
        "git": _git_commit(),
        "command": command,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the folder the run was started in, with `-dirty` when files differ; None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
