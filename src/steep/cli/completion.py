"""What the shell offers at the tab key beyond commands and options: folders of runs, and keys of the configuration.

Where nothing of these fits, the shell offers files by itself.
"""

from __future__ import annotations

from pathlib import Path

from steep.runtime.run_directory import is_run_directory

USUAL_FOLDER = "runs"
LEAST_OF_A_KEY = 3
"""So many characters of `--section` are typed before the keys are offered: before, they would bury the options."""


def run_folders(incomplete: str) -> list[str]:
    """The folders of runs whose path begins as typed; those in `runs` where nothing is typed."""
    pattern = f"{incomplete}*" if incomplete else f"{USUAL_FOLDER}/*"
    folder, _, name = pattern.rpartition("/")
    found = Path(folder or ("/" if pattern.startswith("/") else ".")).glob(name)
    prefix = f"{folder}/" if "/" in pattern else ""
    return sorted(f"{prefix}{path.name}" for path in found if is_run_directory(path))


def config_keys(incomplete: str) -> list[str]:
    """The overrides that begin as typed: `--optimizer.learning_rate`."""
    if len(incomplete) < LEAST_OF_A_KEY or not incomplete.startswith("--"):
        return []
    from steep.config.keys import all_keys, dotted  # pydantic is heavy

    keys = (f"--{dotted(location)}" for location in all_keys() if not any("<" in str(part) for part in location))
    return [key for key in keys if key.startswith(incomplete)]
