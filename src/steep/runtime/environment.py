"""What a run ran on: versions, machine, git state. No torch unless it is already imported."""

from __future__ import annotations

import os
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
    """The commit of the folder the run was started in, with `-dirty` when files differ; None outside a repository.

    Whether files differ is not asked where the repository's own configuration names filters: git would run them.
    """
    commit, settings = _git("describe", "--always", "--abbrev=12"), _git("config", "--local", "--name-only", "--list")
    if not commit or settings is None:
        return None
    if any(name.startswith("filter.") for name in settings.lower().split()) or "include" in settings.lower():
        return commit
    changed = _git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str | None:
    """What git prints; None if it fails. Programs that the repository's configuration names are not run."""
    quiet = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    try:
        result = subprocess.run(["git", *quiet, *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
