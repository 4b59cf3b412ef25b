"""The written pages as data: their fenced blocks, links and code spans. A block's mark is the HTML comment on the line before it:
`<!-- test: name -->` is run with the other blocks of that name, `<!-- file: name -->` is written to a file first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(path for path in (ROOT / "examples").rglob("*.md") if "runs" not in path.parts),
]

_MARK = re.compile(r"<!-- (test|file): (\S+) -->")
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    """Relative to the repository."""
    line: int
    language: str
    text: str
    kind: str = ""
    """test, file or nothing."""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def page_name(page: Path) -> str:
    """The page's path relative to the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        mark = _MARK.fullmatch(lines[start - 1].strip()) if start else None
        kind, name = (mark[1], mark[2]) if mark else ("", "")
        text = "\n".join(lines[start + 1 : number]) + "\n"
        yield Block(page_name(page), start + 1, lines[start][3:].strip(), text, kind, name)
        start = None
    assert start is None, f"{page}: a block that begins at line {start} never ends"


def all_blocks() -> list[Block]:
    """The fenced blocks of every page."""
    return [block for page in PAGES for block in blocks_of(page)]


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links_of(page: Path) -> list[str]:
    """Targets of the page's Markdown links."""
    return _LINK.findall(prose_of(page))


def spans_of(page: Path) -> list[str]:
    """The page's inline code."""
    return _SPAN.findall(prose_of(page))


def shell_lines(block: Block) -> list[str]:
    """The commands of a bash block, continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
