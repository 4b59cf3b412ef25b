"""What is at a path, as plain values: token store, run, checkpoint or model folder. No torch, no weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from steep.core.errors import ConfigError, DataError
from steep.core.files import read_json
from steep.core.units import format_bytes
from steep.train.run_directory import RunDirectory, is_run_directory

SHOWN_CHARACTERS = 400
SHOWN_ITEMS = 8
SHOWN_NUMBERS = 24
"""What the text form shows of long values; --json has them whole."""


def inspect_path(path: str | os.PathLike[str], *, verify: bool = False) -> dict[str, Any]:
    """Describe whatever is at `path`. Raises ConfigError for something that steep does not know.

    verify: also read every byte and compare checksums, where there are any.
    """
    from steep.store.reader import is_store

    folder = Path(path)
    if is_run_directory(folder):
        return _inspect_run(RunDirectory(folder), verify)
    if (folder / "train_state.json").is_file():
        return _inspect_checkpoint(folder, verify)
    if is_store(folder):
        return _inspect_store(folder, verify)
    if (folder / "config.json").is_file():
        return _inspect_model(folder)
    what = "there is nothing" if not folder.exists() else "this is none of them"
    raise ConfigError(
        f"{path}: {what}. steep inspect takes a token store (a folder with manifest.json, or a Megatron .bin/.idx pair), "
        "a run directory, a checkpoint, or a model folder with config.json."
    )


def _inspect_store(path: Path, verify: bool) -> dict[str, Any]:
    from steep.store.inspect import inspect_store
    from steep.store.reader import open_store

    found = inspect_store(path)
    if verify:
        open_store(path).verify()
        found["verified"] = "every shard equals its checksums"
    return found


def _inspect_run(run: RunDirectory, verify: bool) -> dict[str, Any]:
    from steep.checkpoint.retention import checkpoint_folders, read_latest

    checkpoints = [folder.name for folder in checkpoint_folders(run.checkpoints)]
    found = {
        "kind": "run",
        "path": str(run.path),
        "plan": run.read("plan.json"),
        "summary": run.read("summary.json"),
        "ledger": run.read("ledger.json"),
        "checkpoints": checkpoints,
        "latest": read_latest(run.checkpoints),
    }
    if verify:
        found["verified"] = {name: _problems(run.checkpoints / name) for name in checkpoints}
    return found


def _inspect_checkpoint(path: Path, verify: bool) -> dict[str, Any]:
    manifest = read_json(path / "manifest.json") if (path / "manifest.json").exists() else None
    found = {
        "kind": "checkpoint",
        "path": str(path),
        "manifest": manifest or "missing: this checkpoint is not whole",
        "state": read_json(path / "train_state.json"),
    }
    if verify:
        found["verified"] = _problems(path)
    return found


def _problems(checkpoint: Path) -> str | list[str]:
    from steep.checkpoint.load import checkpoint_problems

    return checkpoint_problems(checkpoint) or "every file equals its checksum"


def _inspect_model(path: Path) -> dict[str, Any]:
    weights = sorted(path.glob("*.safetensors"))
    return {
        "kind": "model",
        "path": str(path),
        "config": read_json(path / "config.json"),
        "weight_files": {file.name: format_bytes(file.stat().st_size) for file in weights},
        "tokenizer": sorted(file.name for file in path.glob("tokenizer*")),
    }


def inspect_sequence(path: Path, index: int) -> dict[str, Any]:
    """Sequence `index` of a run's plan: which documents and tokens, and their text. Raises DataError, ConfigError."""
    from steep.evaluate.subject import config_of_run
    from steep.tokenizer.load import load_tokenizer
    from steep.train.data import open_run_data

    if not is_run_directory(path):
        raise ConfigError(f"{path}: --sequence needs a run directory")
    config = config_of_run(path)
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    data = open_run_data(config.data, tokenizer, config.run.seed)
    planned = data.plan.sequence(index)
    store = data.stores[planned.source]
    if not planned.ranges:
        raise DataError(f"sequence {index} is empty")
    return {
        "kind": "sequence",
        "index": index,
        "epoch": index // data.plan.sequences_per_epoch,
        "source": data.names[planned.source],
        "documents": [
            {
                "document": part.document,
                "start": part.start,
                "tokens": part.count,
                "text": tokenizer.decode(store.document(part.document)[part.start : part.start + part.count]),
            }
            for part in planned.ranges
        ],
    }


def as_text(value: Any, indent: int = 0) -> str:
    """Plain values as indented lines for people; long texts shortened."""
    pad = "  " * indent
    if isinstance(value, dict):
        return "\n".join(_entry(str(key), item, indent) for key, item in value.items())
    if isinstance(value, list):
        lines = [f"{pad}- {as_text(item, indent + 1).lstrip()}" for item in value[:SHOWN_ITEMS]]
        more = [f"{pad}… and {len(value) - SHOWN_ITEMS:,} more"] if len(value) > SHOWN_ITEMS else []
        return "\n".join([*lines, *more]) or f"{pad}none"
    return f"{pad}{_short(value)}"


def _entry(key: str, value: Any, indent: int) -> str:
    pad = "  " * indent
    if isinstance(value, list) and value and all(isinstance(item, (int, float)) for item in value):
        return f"{pad}{key}: {' '.join(map(str, value[:SHOWN_NUMBERS]))}{' …' if len(value) > SHOWN_NUMBERS else ''}"
    if isinstance(value, (dict, list)) and value:
        return f"{pad}{key}:\n{as_text(value, indent + 1)}"
    return f"{pad}{key}: {'none' if value in (None, [], {}) else _short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]} … ({len(value):,} characters)"
    return text.replace("\n", "⏎ ")
