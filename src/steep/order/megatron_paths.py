"""The ways in which Megatron and NeMo Automodel name datasets. In: a value of the configuration. Out: prefixes and weights.

A list of prefixes, a flat list `[weight, prefix, weight, prefix]`, a glob, a JSON file of any of these, or one of them per split.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.core.errors import ConfigError
from steep.order.megatron_index import SPLIT_NAMES

_ALIASES = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2}
_SUFFIXES = (".bin", ".idx")


@dataclass(frozen=True)
class Blend:
    """Datasets that are drawn from together.

    prefixes: each without .bin or .idx, as it was given otherwise. weights: one each, not normalized; None without weights.
    """

    prefixes: list[str]
    weights: list[float] | None = None


def read_blend(given: Any) -> Blend | list[Blend | None]:
    """One blend, or one for each of train, validation and test (None where there is none). Raises ConfigError.

    given: a string (prefix, glob, or a .json file), a list, a `Blend`, or a mapping of splits to these.
    """
    if isinstance(given, Blend):
        return given
    if isinstance(given, Mapping):
        return _per_split(given)
    if isinstance(given, (str, Path)):
        return _from_json(Path(given)) if str(given).endswith(".json") else Blend(_expand(str(given)))
    if isinstance(given, Sequence):
        return _from_list(list(given))
    raise ConfigError(f"data.train: {given!r} names no datasets: give prefixes of .bin and .idx files, or a JSON file.")


def _per_split(given: Mapping[str, Any]) -> list[Blend | None]:
    blends: list[Blend | None] = [None] * len(SPLIT_NAMES)
    for name, value in given.items():
        if name not in _ALIASES:
            raise ConfigError(f"data.train: {name!r} is not a split; the splits are train, validation and test.")
        split = _ALIASES[name]
        if blends[split] is not None:
            raise ConfigError(f"data.train: the split {SPLIT_NAMES[split]} is given twice.")
        blend = None if value is None else read_blend(value)
        if isinstance(blend, list):
            raise ConfigError(f"data.train: the split {name!r} is divided into splits again; give it prefixes.")
        blends[split] = blend
    return blends


def _from_json(path: Path) -> Blend | list[Blend | None]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, (list, dict)):
        raise ConfigError(f"{path}: holds neither a list of datasets nor one for each split.")
    return read_blend(value)


def _from_list(items: list[Any]) -> Blend:
    """A list as Megatron reads it: with weights if it has an even number of items and every other one is a number."""
    if not items:
        raise ConfigError("data.train: the list of datasets is empty.")
    numbers = [_number(item) for item in items[::2]]
    weights = [number for number in numbers if number is not None]
    if len(items) % 2 or not weights:
        return Blend([prefix for item in items for prefix in _expand(_text(item))])
    if len(weights) < len(numbers):
        wrong = items[2 * numbers.index(None)]
        raise ConfigError(f"data.train: in [weight, prefix, ...], {wrong!r} is where a weight is needed.")
    prefixes = [_text(item) for item in items[1::2]]
    for prefix, weight in zip(prefixes, weights, strict=True):
        if _expand(prefix) != [strip_suffix(prefix)]:
            raise ConfigError(f"data.train: {prefix!r} is a glob with a weight; give each of its datasets one.")
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data.train: the weight of {prefix!r} is {weight}; it must be a number above 0.")
    return Blend([strip_suffix(prefix) for prefix in prefixes], weights)


def _text(item: Any) -> str:
    if isinstance(item, (str, Path)):
        return str(item).strip()
    raise ConfigError(f"data.train: {item!r} is where the prefix of a dataset is needed.")


def _number(item: Any) -> float | None:
    if isinstance(item, bool) or not isinstance(item, (int, float, str)):
        return None
    try:
        return float(item)
    except ValueError:
        return None


def _expand(prefix: str) -> list[str]:
    """A prefix as it is; a glob as the sorted prefixes of the .bin and .idx files that it matches."""
    if not glob.has_magic(prefix) or any(Path(prefix + suffix).is_file() for suffix in _SUFFIXES):
        return [strip_suffix(prefix)]
    files = {file for pattern in {prefix, *(prefix + suffix for suffix in _SUFFIXES)} for file in glob.glob(pattern)}
    prefixes = sorted({strip_suffix(file) for file in files if file.endswith(_SUFFIXES)})
    if not prefixes:
        raise ConfigError(f"data.train: {prefix!r} matches no .bin and .idx files.")
    return prefixes


def strip_suffix(path: str) -> str:
    """The prefix of a .bin or .idx file."""
    return path[:-4] if path.endswith(_SUFFIXES) else path
