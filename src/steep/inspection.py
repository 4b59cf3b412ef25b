"""What is at a path, as plain values: token store, run, checkpoint or model folder. No torch, no weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from steep.checkpoint.retention import checkpoint_folders, read_latest
from steep.core.errors import ConfigError, DataError
from steep.core.files import read_object
from steep.core.public import public
from steep.core.say import say_nothing
from steep.core.units import counted, format_bytes
from steep.evaluation.model_reference import config_of_run
from steep.order.data_order import DataOrder, same_past
from steep.runtime.run_directory import RunDirectory, is_run_directory
from steep.store.cut_store import CutStore
from steep.store.formats import formats
from steep.store.inspect import inspect_store
from steep.store.reader import is_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import load_tokenizer

SHOWN_CHARACTERS = 400
SHOWN_ITEMS = 8
SHOWN_NUMBERS = 24
BAR_CHARACTERS = 40
"""What the text form shows of long values; --json shows them in full."""


@public
def inspect(
    path: Union[str, os.PathLike[str]],
    *,
    sequence: Optional[int] = None,
    verify: bool = False,
    tokenizer: Optional[str] = None,
    seed: int = 0,
    format: str = "auto",
) -> dict[str, Any]:
    """What is at a path, as plain values: a token store, a run, a checkpoint or a model folder.

    sequence: of a run, the documents and the text of this sequence instead. verify: also read every byte and compare checksums,
    where there are any. Of token stores: `tokenizer` names the one of a store that has none beside it, `seed` chooses the
    documents that are shown, `format` is the tool that wrote it. Raises ConfigError for anything else.
    """
    if sequence is not None:
        return inspect_sequence(Path(path), sequence)

    if format not in ("auto", *formats()):
        raise ConfigError(f"format {format!r}: use one of auto, {', '.join(formats())}")

    folder = Path(path)
    if is_run_directory(folder):
        return _inspect_run(RunDirectory(folder), verify)
    if (folder / "train_state.json").is_file():
        return _inspect_checkpoint(folder, verify)
    if is_store(folder) or (format != "auto" and folder.exists()):
        given = None
        if tokenizer is not None:
            given = load_tokenizer(TokenizerConfig(pretrained=tokenizer, append_eos=False, prepend_bos=False))
        return inspect_store(folder, tokenizer=given, seed=seed, format=format, verify=verify)
    if (folder / "config.json").is_file():
        return _inspect_model(folder)
    what = "there is nothing" if not folder.exists() else "this is none of them"
    raise ConfigError(
        f"{path}: {what}. steep inspect takes a token store (a folder with manifest.json, or token files of another tool), "
        "a run directory, a checkpoint, or a model folder with config.json."
    )


def _inspect_run(run: RunDirectory, verify: bool) -> dict[str, Any]:
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
    manifest = read_object(path / "manifest.json") if (path / "manifest.json").exists() else None
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(path),
        "manifest": manifest or "missing: this checkpoint is incomplete",
        "state": read_object(path / "train_state.json"),
    }
    if verify:
        found["verified"] = _problems(path)
    return found


def _problems(checkpoint: Path) -> str | list[str]:
    from steep.checkpoint.load import checkpoint_problems  # torch is heavy

    return checkpoint_problems(checkpoint) or "every file equals its checksum"


def _inspect_model(path: Path) -> dict[str, Any]:
    weights = sorted(path.glob("*.safetensors"))
    return {
        "kind": "model",
        "path": str(path),
        "config": read_object(path / "config.json"),
        "weight_files": {file.name: format_bytes(file.stat().st_size) for file in weights},
        "tokenizer": sorted(file.name for file in path.glob("tokenizer*")),
    }


def inspect_sequence(path: Path, index: int) -> dict[str, Any]:
    """Sequence `index` of a run's sample order: which documents and tokens, and their text. Raises DataError, ConfigError."""
    # torch is heavy
    from steep.data.open import open_run_data
    from steep.evaluation.text_writer import open_writer

    if not is_run_directory(path):
        raise ConfigError(f"{path}: --sequence needs a run directory")
    config = config_of_run(path)
    tokenizer = load_tokenizer(config.tokenizer, config.model, vocabulary=config.vocabulary)
    data = open_run_data(config, tokenizer, say_nothing, generator=open_writer)
    order = _order_of_run(path, data.order, index)
    sequence = order.sequence(index)
    store = data.stores[sequence.source]
    if not sequence.ranges:
        raise DataError(f"sequence {index} is empty")
    documents = []
    for part in sequence.ranges:
        tokens = np.empty(part.count, dtype=np.int64)
        store.read(part.document, part.start, part.count, tokens)
        text = tokenizer.decode(tokens)
        document, start = part.document, part.start
        if isinstance(store, CutStore):
            document, start = store.origin(document, start)
        documents.append({"document": document, "start": start, "tokens": part.count, "text": text})
    return {
        "kind": "sequence",
        "index": index,
        "epoch": index // order.sequences_per_epoch,
        "source": data.names[sequence.source],
        "documents": documents,
    }


def _order_of_run(path: Path, order: DataOrder, index: int) -> DataOrder:
    """The order that the run's newest checkpoint was trained in, which begins where its data was last changed on purpose.

    Raises ConfigError for a sequence that the run does not have, or took from other data, DataError where the data is not the
    run's.
    """
    from steep.checkpoint.load import find_checkpoint  # torch is heavy

    if index < 0:
        raise ConfigError(f"--sequence {index}: sequences are counted from 0")
    if not any(RunDirectory(path).checkpoints.glob("epoch_*_step_*")):
        return order
    state = read_object(find_checkpoint(path) / "train_state.json")
    first = state["plan"].get("first_sequence") or 0
    if index < first:
        raise ConfigError(
            f"--sequence {index}: the data of {path} was changed at sequence {first:,}, and only what came after is known. "
            f"Give {first} or more."
        )
    order = order.beginning_at(first) if first else order
    changed = same_past(state["plan"], order.describe(), state["sequences_seen"])
    if changed:
        raise DataError(
            f"the data has changed since {path} was trained: {'; '.join(changed)}. Restore it to see its sequences."
        )
    return order


def store_as_text(found: dict[str, Any]) -> str:
    """What `inspect_store` found, as lines for people, with a histogram and tables."""
    apart = ("ids", "length_histogram", "examples", "fertility", "sources")
    shown = {key: value for key, value in found.items() if key not in apart and value not in (None, [])}
    if found["sources"]:
        size = sum(file["size"] for file in found["sources"])
        shown["sources"] = f"{counted(len(found['sources']), 'file')}, {format_bytes(size)} (--json lists them)"
    ids, few = found["ids"], found["fertility"]
    lines = [as_text(shown)]
    if few is not None:
        lines.append(
            f"fertility: {few['tokens_per_word']} tokens per word, {few['bytes_per_token']} bytes per token "
            f"(of {few['of_tokens']:,} tokens in {few['of_documents']:,} documents)"
        )
    lines += ["documents by tokens:", *_histogram(found["length_histogram"])]
    of = "all" if ids["whole_store"] else "a sample of"
    lines.append(f"ids: {ids['different']:,} different in {of} {ids['counted_tokens']:,} tokens")
    if "never_used" in ids:
        never = ids["never_used"]
        lines.append(
            f"  never used: {never['ids']:,} of the tokenizer's {never['of']:,} ({100 * never['share']:.1f} %)"
        )
    if "unknown" in ids:
        lines.append(f"  unknown (id {ids['unknown']['id']}): {100 * ids['unknown']['share']:.4f} % of the tokens")
    if ids.get("beyond_the_tokenizer"):
        lines.append(f"  beyond the tokenizer's vocabulary: {ids['beyond_the_tokenizer']:,} tokens")
    frequent = [
        (entry["id"] if entry["text"] is None else repr(entry["text"]), entry) for entry in ids["most_frequent"]
    ]
    lines.append("  most frequent: " + ", ".join(f"{name} {100 * entry['share']:.1f} %" for name, entry in frequent))
    lines.append("random documents:")
    for example in found["examples"]:
        content = " ".join(map(str, example["first_ids"])) if example["text"] is None else example["text"]
        lines.append(f"  {example['document']:,} ({example['tokens']:,} tokens): {_short(content)}")
    return "\n".join(lines)


def _histogram(bins: list[dict[str, int]]) -> list[str]:
    most = max((entry["documents"] for entry in bins), default=0)
    ranges = [
        f"{entry['from']:,}" if entry["from"] == entry["to"] else f"{entry['from']:,}-{entry['to']:,}" for entry in bins
    ]
    width = max(map(len, ranges), default=0)
    lines = []
    for text, count in zip(ranges, [entry["documents"] for entry in bins], strict=True):
        bar = "█" * max(round(BAR_CHARACTERS * count / most), 1) if count else ""
        lines.append(f"  {text:>{width}} {bar:<{BAR_CHARACTERS}} {count:,}")
    return lines


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
