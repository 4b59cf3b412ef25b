"""What `prepare` made or found, and how it is reported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steep.core.units import format_bytes, format_count, format_seconds
from steep.sources.dropped import advice_on_dropped, reasons_dropped
from steep.store.manifest import CONTAMINATED_FILE, REJECTED_FILE


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` made or found."""

    path: Path
    """The token store."""
    documents: int
    tokens: int
    ledger: dict[str, Any] = field(repr=False)
    """records_read, documents_kept, dropped {reason: count}, text_bytes, tokens."""
    seconds: float
    already_there: bool = False
    """The store was already complete; nothing was written."""
    shards_continued: int = 0
    """Shards that an earlier, interrupted call had finished."""
    files: tuple[Path, ...] = ()
    """The .bin files that were written for another tool."""
    hints: tuple[str, ...] = ()
    """What was left out on purpose, and settings that seem to be missing."""

    def __str__(self) -> str:
        dropped = reasons_dropped(self.ledger) or "none"
        how = "already there" if self.already_there else f"prepared in {format_seconds(self.seconds)}"
        summary = (
            f"{self.path}: {self.documents:,} documents, {format_count(self.tokens)} tokens from "
            f"{format_bytes(self.ledger['text_bytes'])} of text, {how}. "
            f"{self.ledger['records_read']:,} records read, dropped: {dropped}."
        )
        return "\n".join([summary, *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        if self.ledger["dropped"] and (self.path / REJECTED_FILE).is_file():
            advice = advice_on_dropped(self.ledger)
            yield f"dropped records: {advice}{advice and '; '}all are listed in {self.path / REJECTED_FILE}"
        yield from self.hints
        if (unused := self.ledger.get("not_used")) is not None:
            yield f"not used: the last {format_bytes(unused['bytes'])} of the input, since {unused['reason']}."
        repeats = self.ledger.get("exact_duplicates", {"documents": 0, "tokens": 0})
        if repeats["documents"]:
            yield (
                f"{repeats['documents']:,} documents ({format_count(repeats['tokens'])} tokens) repeat an earlier one word "
                "for word; --dedup exact drops them."
            )
        if (found := self.ledger.get("contamination")) is not None:
            yield (
                f"{found['documents']:,} documents ({format_count(found['tokens'])} tokens) share {found['run_words']} words "
                f"in a row with the evaluation texts{f'; see {CONTAMINATED_FILE}' if found['documents'] else ''}."
            )
            for text in found["texts"]:
                if text.get("rejected"):
                    yield (
                        f"{text['text']}: {text['rejected']:,} of {text['rejected'] + text['documents']:,} records were "
                        "dropped, so documents were not compared with them."
                    )
        if self.files:
            others = f" and {len(self.files) - 1:,} more" if len(self.files) > 1 else ""
            yield f"{self.files[0]}{others}: written."
