"""Writes docs/reference/models.md, the table of the families that were tried: `python tests/families/page.py [family ...]`.

In: the trials of every causal family of the installed transformers, or of those named. Out: the page, or those lines of it. The
heavy test `tests/equivalence/test_families.py` makes the same trials and compares them with the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

from families.trial import Trial, families, try_family, workshop

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
ATTENTION = {
    "document": "inside documents",
    "sdpa": "packed, sdpa",
    "eager": "packed, eager",
    "own": "packed, its own",
    "rows": "a row for each document",
    "": "–",
}
INTRODUCTION = """# Models: tried with

Every causal language model of transformers {version} was built tiny, planned, trained two steps, resumed at the first one (equal
to the last bit), exported and loaded back by transformers, in full and with LoRA. {count} of {total} families pass all of it both
ways. Written by `python tests/families/page.py`; `make test-all` tries all of them again. Tiny models say nothing about memory
or speed, nor about weights that a hub offers under another family's name.

**Attention** says how documents in one sequence are kept apart. *Inside documents* is computed document by document, with a
varlen kernel on CUDA. *Packed* is transformers' own with positions that restart, where that gives the same numbers. *A row for
each document* is for layers that carry state, and for attention without a form for packed documents
([why](../design/document_masks.md)).
"""
REMARKS = {"not trained": "some tensors get no gradient (named)", "loss": "its logits are made whole"}
"""What the console says before a colon -> the remark in the table."""
WORKING_CELLS = 3
"""Cells of the line of a family that passes everything; the others have one more."""


def try_all(names: Iterable[str]) -> Iterator[list[Trial]]:
    """The trials of each of these families, as they come."""
    with workshop() as (folder, tokenizer, store):
        for name in names:
            yield try_family(name, folder, tokenizer, store)


def page_text(rows: dict[str, str]) -> str:
    """The page. rows: family -> its line."""
    import transformers

    works = [row for _, row in sorted(rows.items()) if row.count(" | ") == WORKING_CELLS - 1]
    rest = [row for _, row in sorted(rows.items()) if row not in works]
    introduction = INTRODUCTION.format(version=transformers.__version__, count=len(works), total=len(rows))
    lines = [introduction, "| Family | Attention | Remarks |", "|---|---|---|", *works]
    lines += ["", "## Not, or not both ways", "", "| Family | Full | LoRA | Why |", "|---|---|---|---|", *rest]
    return "\n".join(lines) + "\n"


def rows_of(page: str) -> dict[str, str]:
    """The lines of a page by family."""
    found = re.findall(r"^(\| ([a-z0-9_-]+) \|.*)$", page, flags=re.MULTILINE)
    return {family: row for row, family in found}


def row_of(pair: list[Trial]) -> str:
    """The line of a family."""
    return working_row(pair) if all(trial.works for trial in pair) else other_row(pair)


def working_row(pair: list[Trial]) -> str:
    """The line of a family that passes everything; the remarks are those of full training."""
    remarks = {REMARKS[line.partition(":")[0]]: None for line in pair[0].said if line.partition(":")[0] in REMARKS}
    return f"| {pair[0].family} | {ATTENTION[pair[0].attention]} | {'; '.join(remarks)} |"


def other_row(pair: list[Trial]) -> str:
    """The line of a family that is refused or fails."""
    reasons = {_reason(trial): None for trial in pair if not trial.works}
    return f"| {pair[0].family} | {' | '.join(_outcome(trial) for trial in pair)} | {'; '.join(reasons)} |"


def _outcome(trial: Trial) -> str:
    if trial.works:
        return "yes"
    last = trial.done[-1] if trial.done else "not built"
    return f"{last}, then {'refused' if trial.refused else 'fails'}" if trial.done else last


def _reason(trial: Trial) -> str:
    return _plain(trial.refused or trial.crashed)


def _plain(text: str, most: int = 200) -> str:
    """Text for a cell of a table: one line, without what changes from run to run."""
    text = " ".join(text.split()).replace("|", "/").replace("<", "&lt;")
    text = re.sub(r"/[^ ]*/([^/ ]+)", r"\1", text)
    text = re.sub(r"\b\d+\.\d+e[+-]\d+\b", "x", text)
    return text if len(text) <= most else text[:most].rpartition(" ")[0] + " …"


def main(names: list[str]) -> None:
    """Try the families named, or all of them, and write their lines into the page."""
    rows = rows_of(PAGE.read_text(encoding="utf-8")) if names else {}
    for pair in try_all(names or families()):
        rows[pair[0].family] = row_of(pair)
        print(rows[pair[0].family], flush=True)
        for trial in pair:
            if problem := trial.refused or trial.crashed:
                print(f"  {trial.adapter}: {problem}", flush=True)
    PAGE.write_text(page_text(rows), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
