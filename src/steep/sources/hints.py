"""What a person should know about a source before it is prepared. Nothing is changed."""

from __future__ import annotations

from steep.core.say import Say
from steep.sources.config import SourceConfig
from steep.sources.files import open_binary
from steep.sources.inputs import STANDARD_INPUT, code_folders, expand_inputs, paths_of
from steep.sources.lingua import held_out_below

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
LOOKED_AT_BYTES = 1 << 20
LOOKED_AT_FILES = 20


def say_hints(source: SourceConfig, say: Say) -> None:
    """Say which files are left out on purpose, and which setting seems to be missing. Raises DataError as reading does."""
    if STANDARD_INPUT in paths_of(source):
        return
    files = held_out_below(paths_of(source))
    if files:
        more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
        say(f"{files[0]}{more}: held out as in lingua, not trained on; name it under data.validation to score it")
    folders = code_folders(source)
    for folder, code in folders:
        say(code.line(folder))
    if source.format not in ("auto", "plain_text"):
        return
    inputs = expand_inputs(source)
    if not folders and (scripts := [file.path for file in inputs if file.format == "code"]):
        others = f" and {len(scripts) - 1:,} more" if len(scripts) > 1 else ""
        say(f"{scripts[0]}{others}: source code, read as text")
    # A plain text file with literal end-of-text marks is meant to be many documents; without a separator it is one.
    if source.document_separator is not None:
        return
    files = [file.path for file in inputs if file.format == "plain_text"]
    for path in files[:LOOKED_AT_FILES]:
        with open_binary(path, source) as (stream, _):
            start = stream.read(LOOKED_AT_BYTES)
        mark = next((mark for mark in SEPARATORS if mark.encode() in start), None)
        if mark is not None:
            say(
                f"{path}: holds {mark!r} {start.count(mark.encode()):,} times in its first {len(start):,} bytes, but is read as "
                f"one document, and the marks as text. To split there: document_separator: {mark!r}"
            )
            return
