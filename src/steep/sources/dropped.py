"""What a person is told of records that were dropped: how many, why, how large, and which setting would keep them.

In: records, or a ledger as a token store's manifest or a stream keeps it. Out: their sums, and one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from steep.core.units import counted, format_bytes
from steep.sources.document import NO_FIELD, Rejected, advice_for, needs_writing

MOST_FIELDS = 100
"""Other fields that are counted. A file may name its fields as it likes; memory is bounded all the same."""


@dataclass
class DroppedCount:
    """Sums over rejected records."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Records by reason."""
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    """Their size by reason."""
    other_fields: Counter[str] = field(default_factory=Counter)
    """Records without a text field, by the field that probably holds their text."""

    def add(self, record: Rejected) -> None:
        """Count one more."""
        self.dropped[record.reason] += 1
        self.dropped_bytes[record.reason] += record.num_bytes
        self._count_field(record.other_field, 1)

    def include(self, sums: Mapping[str, Mapping[str, int]]) -> None:
        """Count what other sums hold. sums: by the names of these fields, as in a ledger or a stream's cursor."""
        self.dropped.update(sums["dropped"])
        self.dropped_bytes.update(sums["dropped_bytes"])
        for name, count in sums["other_fields"].items():
            self._count_field(name, count)

    def _count_field(self, name: str, count: int) -> None:
        if name and (len(self.other_fields) < MOST_FIELDS or name in self.other_fields):
            self.other_fields[name] += count

    def to_ledger(self) -> dict[str, dict[str, int]]:
        """As in a ledger, in alphabetical order; sizes and fields only if something was dropped."""
        sums = {name: dict(sorted(counter.items())) for name, counter in vars(self).items()}
        return {name: counts for name, counts in sums.items() if counts or name == "dropped"}


def reasons_dropped(ledger: Mapping[str, Any]) -> str:
    """`480 no text field (60.1 KiB), 1 too long (66.8 MiB)`, most frequent first; empty if nothing was dropped."""
    sizes = ledger.get("dropped_bytes") or {}  # stores of older versions have none
    counts = sorted((ledger.get("dropped") or {}).items(), key=lambda pair: -pair[1])
    shown = [(f"{count:,} {reason}", sizes.get(reason, 0)) for reason, count in counts]
    return ", ".join(f"{text} ({format_bytes(size)})" if size else text for text, size in shown)


def advice_on_dropped(ledger: Mapping[str, Any]) -> str:
    """What would keep most of the records that have no text field; empty if nothing would. A field that is in fewer records
    than were kept is only named: reading it instead would lose those."""
    fields = ledger.get("other_fields") or {}
    if not fields or NO_FIELD not in (ledger.get("dropped") or {}):
        return ""
    field, count = max(fields.items(), key=lambda pair: pair[1])
    advice = advice_for(field)
    if needs_writing(field):
        return advice
    if count > ledger.get("documents_kept", 0):
        return f"{advice} (it is in {counted(count, 'record')})"
    return f"{count:,} of them have a text in {field!r}, which text_key: {field} would read instead"


def dropped_line(
    name: str, ledger: Mapping[str, Any], listed_in: Optional[Path] = None, read: str = ""
) -> Optional[str]:
    """One line on the records of a source that were dropped; None without any.

    listed_in: a store's rejected.jsonl, if it is there. read: what `records_read` covers, such as `so far`.
    """
    lost = sum((ledger.get("dropped") or {}).values())
    if not lost:
        return None
    line = f"{name}: {lost:,} of {ledger['records_read']:,} records{read and ' ' + read} were dropped: {reasons_dropped(ledger)}"
    if advice := advice_on_dropped(ledger):
        line += f"; {advice}"
    if listed_in is not None and listed_in.is_file():
        line += f"; all are listed in {listed_in}"
    return line
