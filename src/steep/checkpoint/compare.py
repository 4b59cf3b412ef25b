"""Whether a checkpoint is of this run: which settings differ, which may, and what each change means. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FREE = (
    "recipe", "console", "trackers", "report", "checkpoint", "evaluate", "run.name", "run.directory",
    "data.cache_directory", "data.prepare", "data.index_cache_directory", "train.max_seconds",
)  # fmt: skip
"""Keys, with everything below them, that do not affect what is learned: they may change at every resume."""

SCORES_CHANGE = "held-out scores are of other text from here on, so the score at the start is dropped"
ROUNDING = "losses will equal the uninterrupted run's to rounding, not bit for bit"

WARNED = {
    "train.steps": "the learning-rate schedule follows the new length from here on",
    "train.epochs": "the learning-rate schedule follows the new length from here on",
    "train.tokens": "the learning-rate schedule follows the new length from here on",
    "train.threads": "sums are taken in another order, so losses will not equal the uninterrupted run's bit for bit",
    "train.micro_batch_size": ROUNDING,
    "train.loss_chunk_bytes": ROUNDING,
    "train.compile": ROUNDING,
    "train.activation_checkpointing": ROUNDING,
    "train.device": ROUNDING,
    "train.deterministic": ROUNDING,
    "train.on_spike": "loss spikes are handled differently from here on",
    "train.spike_window_steps": "loss spikes are handled differently from here on",
    "data.validation": SCORES_CHANGE,
    "data.num_val_samples": SCORES_CHANGE,
    "evaluate.tokens": SCORES_CHANGE,
    "model.attention": ROUNDING,
}
"""Keys that may change, and what the change does."""

_ABSENT = object()


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], saved_order: str = "", current_order: str = ""
) -> list[str]:
    """What makes `current` another run than the one that was saved; one line per key, empty if it can be resumed.

    saved, current: resolved configurations as plain mappings (`RunConfig.to_mapping`). saved_order, current_order:
    fingerprints of the sample orders. Equal orders hold the same sequences, so paths below `data` and `tokenizer` may then
    differ (the data was moved). Different orders are a difference of their own.
    """
    same_order = bool(saved_order) and saved_order == current_order
    free = (*FREE, *WARNED, "data.train", "data.phases", "tokenizer") if same_order else (*FREE, *WARNED)
    lines = [_line(*change) for change in _changes(saved, current) if not _is_below(change[0], free)]
    if saved_order != current_order:
        lines.insert(0, f"sample order: saved {saved_order or 'none'}, now {current_order or 'none'}: other sequences")
    return lines


def warnings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Differences that are allowed and matter; one line per key with the effect."""
    found = []
    for key, was, now in _changes(saved, current):
        found += [f"{_line(key, was, now)}: {effect}" for warned, effect in WARNED.items() if _is_below(key, (warned,))]
    return found


def _line(key: str, was: Any, now: Any) -> str:
    return f"{key}: saved {_show(was)}, now {_show(now)}"


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, saved value, current value) of every leaf that differs, in the order of the saved configuration."""
    was, now = _leaves(saved), _leaves(current)
    keys = [*was, *(key for key in now if key not in was)]
    pairs = ((key, was.get(key, _ABSENT), now.get(key, _ABSENT)) for key in keys)
    return [(key, before, after) for key, before, after in pairs if not _equal(before, after)]


def _equal(before: Any, after: Any) -> bool:
    """Equal, and a key that is absent equals one that is null: fields may be added to a section later."""
    empty = (_ABSENT, None)
    return before == after or (any(before is e for e in empty) and any(after is e for e in empty))


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; list items as `key[0]`. Empty mappings and lists are leaves."""
    if isinstance(value, Mapping) and value:
        dot = "." if prefix else ""
        parts = [_leaves(child, f"{prefix}{dot}{key}") for key, child in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        parts = [_leaves(child, f"{prefix}[{number}]") for number, child in enumerate(value)]
    else:
        return {prefix: list(value) if isinstance(value, tuple) else value}
    return {key: leaf for part in parts for key, leaf in part.items()}


def _is_below(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith((f"{root}.", f"{root}[")) for root in roots)
