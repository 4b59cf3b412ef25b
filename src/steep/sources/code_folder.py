"""What of a folder is read: everything, unless most of it is code; and what to do about files that steep does not read.

In: the files of a folder. Out: those to read, and what is left out by kind. Main choice: a folder is code if at least half of the
files in it that steep can read are; then other people's code, data and binaries are left out, which a line says. In any other
folder a file that steep cannot read is an error, since a whole part of a corpus might be missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from steep.sources.files import content_suffix

VENDORED_FOLDERS = ("node_modules", "bower_components", "site-packages", "__pycache__", "venv", "third_party", "vendor")
"""Where package managers put other people's code, by name. Source: GitHub's linguist, vendor.yml."""
GENERATED_ENDINGS = (".min.js", ".min.css", ".lock", ".map")
TEXTS = ("code", "plain_text")
MOST_NAMED = 12

ADVICE = {
    ".pdf": "pdftotext -layout a.pdf a.txt (poppler-utils)",
    ".docx": "pandoc a.docx -t plain --wrap=none -o a.txt",
    ".odt": "pandoc a.odt -t plain --wrap=none -o a.txt",
    ".rtf": "pandoc a.rtf -t plain --wrap=none -o a.txt",
    ".doc": "soffice --headless --convert-to txt:Text a.doc",
    ".html": "pandoc a.html -t plain --wrap=none -o a.txt, or trafilatura for pages of the web",
    ".htm": "pandoc a.htm -t plain --wrap=none -o a.txt, or trafilatura for pages of the web",
    ".epub": "pandoc a.epub -t plain --wrap=none -o a.txt",
    ".xlsx": "save the sheet as CSV",
    ".ipynb": "jupyter nbconvert --to markdown a.ipynb",
    ".arrow": "write it as Parquet: datasets.load_from_disk(...).to_parquet('a.parquet')",
    ".zip": "unzip it, or write .jsonl.zst",
    ".tar": "unpack it: tar -xf a.tar",
    ".bz2": "bzip2 -dc a.jsonl.bz2 | zstd -o a.jsonl.zst",
    ".xz": "xz -dc a.jsonl.xz | zstd -o a.jsonl.zst",
}
"""How to get text out of what steep does not read."""


@dataclass(frozen=True)
class CodeFolder:
    """What is read of a folder with code."""

    files: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)
    """Files by kind: an ending, or `node_modules/` and the like."""

    def line(self, folder: str) -> str:
        """By ending what is read, and what is not and why."""
        read = Counter(content_suffix(file) for file in self.files)
        text = f"{folder}: code, one document per file: {counts_by_kind(read)}"
        left_out = f"; left out: {counts_by_kind(self.left_out)}" if self.left_out else ""
        return text + left_out + "".join(f"; {line}" for line in advice_lines(self.left_out))


def code_folder(folder: Path, files: Sequence[Path], formats: Mapping[str, str]) -> CodeFolder | None:
    """What is read of `files`, all below `folder`; None if it is not a folder of code. formats: ending -> format."""
    left_out: Counter[str] = Counter()
    own = []
    for file in files:
        vendored = next((part for part in file.relative_to(folder).parts[:-1] if part in VENDORED_FOLDERS), None)
        generated = next((ending for ending in GENERATED_ENDINGS if file.name.endswith(ending)), None)
        if vendored or generated:
            left_out[f"{vendored}/" if vendored else str(generated)] += 1
        else:
            own.append(file)
    found = [(file, formats.get(content_suffix(file))) for file in own]
    known = [name for _, name in found if name is not None]
    if "code" not in known or 2 * known.count("code") < len(known):
        return None
    for file, name in found:
        if name not in TEXTS:
            left_out[content_suffix(file) or "no ending"] += 1
    return CodeFolder([file for file, name in found if name in TEXTS], left_out)


def advice_lines(endings: Mapping[str, int] | Sequence[str]) -> list[str]:
    """How to get the text of files with these endings, where a way is known."""
    return [f"for the text of {ending}: {ADVICE[ending]}" for ending in endings if ending in ADVICE]


def counts_by_kind(counts: Counter[str]) -> str:
    """`12 .py, 3 .md`, most frequent first."""
    most = counts.most_common(MOST_NAMED)
    more = len(counts) - len(most)
    return ", ".join(f"{count:,} {kind}" for kind, count in most) + (f" and {more} other endings" if more else "")
