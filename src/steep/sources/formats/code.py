"""Source code as text: one document per file, as it is. Plain, gzip or Zstandard.

In: a UTF-8 file. Out: a Document, or Rejected. `code_folder` says what is left out of a folder with code.
Memory: one file, at most `max_record_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from steep.sources.config import SourceConfig
from steep.sources.document import Record, Span
from steep.sources.formats import plain_text

# The endings of GitHub's linguist (languages.yml) for the languages that code models are trained on, without those that
# another format has and those that are mostly data (.json, .csv, .svg, .html, .ipynb).
ENDINGS = (
    ".asm", ".awk", ".bash", ".bat", ".c", ".cc", ".cfg", ".clj", ".cljs", ".cmake", ".coffee", ".cpp", ".cs", ".css", ".cu",
    ".cuh", ".cxx", ".d", ".dart", ".el", ".elm", ".erl", ".ex", ".exs", ".f", ".f90", ".fs", ".glsl", ".go", ".gradle",
    ".graphql", ".groovy", ".h", ".hh", ".hpp", ".hrl", ".hs", ".hxx", ".ini", ".java", ".jl", ".js", ".jsx", ".kt", ".kts",
    ".less", ".lisp", ".lua", ".m", ".mjs", ".ml", ".mli", ".mm", ".nim", ".nix", ".pas", ".php", ".pl", ".pm", ".proto",
    ".ps1", ".py", ".pyi", ".pyx", ".r", ".rb", ".rkt", ".rs", ".s", ".sass", ".scala", ".scm", ".scss", ".sh", ".sol",
    ".sql", ".sv", ".svelte", ".swift", ".tcl", ".tex", ".tf", ".toml", ".ts", ".tsx", ".v", ".vb", ".vhd", ".vhdl", ".vim",
    ".vue", ".yaml", ".yml", ".zig", ".zsh",
)  # fmt: skip


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the one document of `path`. Raises DataError when the file itself cannot be read."""
    return plain_text.read(path, config.model_copy(update={"document_separator": None}))


def split(path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
    """Nothing: a file is one document."""
    return []
