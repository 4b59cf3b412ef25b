"""Numbers as people write them: counts ("2B"), times ("30min"), sizes ("8GiB"), both ways; lists of names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
SECOND_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
              "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip

_NUMBER = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def _parse(value: int | float | str, units: Mapping[str, float], kind: str, examples: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{value!r} is not {kind}; write it like {examples}")
    return float(match[1].replace("_", "").replace(",", "")) * units[match[2].lower()]


def parse_count(value: int | float | str) -> int:
    """A whole number of things (tokens, steps) from 2000, "2k", "1.5B" or "2e9". Raises ValueError."""
    number = _parse(value, COUNT_UNITS, "a count", "2000, 500M or 2B")
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def parse_seconds(value: int | float | str) -> float:
    """A duration in seconds from 90, "90s", "30min", "1.5h" or "2d". Raises ValueError."""
    return float(_parse(value, SECOND_UNITS, "a duration", "90s, 30min or 2h"))


def parse_bytes(value: int | float | str) -> int:
    """A size in bytes from 1024, "8GiB" or "500 MB". Raises ValueError."""
    return int(_parse(value, BYTE_UNITS, "a size", "500MB or 8GiB"))


def format_count(number: float) -> str:
    """1234567 -> '1.23M'. Numbers under 10,000 are written out."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(number) >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.4g}"


def counted(number: int, noun: str) -> str:
    """1, "file" -> '1 file'; 1200, "file" -> '1,200 files'. noun: one whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_bytes(number: float) -> str:
    """Bytes in binary units: 8589934592 -> '8.0 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration for people: 3.2 s, 4 min 05 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"


def format_interval(seconds: float) -> str:
    """A duration that a person has chosen, in its largest whole unit: 1800 -> '30 min', 7200 -> '2 h', 90 -> '90 s'."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:g} s"


def listing(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
