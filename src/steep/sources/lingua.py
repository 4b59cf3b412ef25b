"""lingua's folders on disk: `<root>/<source>/*.chunk.*.jsonl` to train on, `*.val.jsonl` held out.

In: files found in folders, or paths. Out: which of them to train on, which to score. All chunks are read, in sorted
order, whatever the number of processes. Source: facebookresearch/lingua `setup/download_prepare_hf_data.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_CHUNK = re.compile(r"\.chunk\.[^.]+\.jsonl(\.gz|\.zst)?$")
_HELD_OUT = re.compile(r"\.val\.jsonl(\.gz|\.zst)?$")


def without_held_out(files: Sequence[Path]) -> list[Path]:
    """The files to train on: all but lingua's validation files."""
    held_out = set(held_out_files(files))
    return [file for file in files if file not in held_out]


def held_out_files(files: Iterable[Path]) -> list[Path]:
    """lingua's validation files among `files`: `*.val.jsonl` in a folder that also has `*.chunk.*.jsonl`."""
    files = list(files)
    folders = {file.parent for file in files if _CHUNK.search(file.name)}
    return [file for file in files if file.parent in folders and _HELD_OUT.search(file.name)]


def validation_paths(paths: Sequence[str]) -> list[str]:
    """The same paths for scoring: a folder of chunks is replaced by the validation files in it or below it, if there are any."""
    found: list[str] = []
    for path in paths:
        files = [str(file) for file in held_out_files(_files_below(path))]
        found += files or [path]
    return found


def held_out_below(paths: Sequence[str]) -> list[Path]:
    """lingua's validation files in the folders among `paths`, which are not trained on."""
    return [file for path in paths for file in held_out_files(_files_below(path))]


def _files_below(path: str) -> list[Path]:
    if not os.path.isdir(path):
        return []
    return sorted((file for file in Path(path).rglob("*.jsonl*") if file.is_file()), key=lambda file: file.parts)
