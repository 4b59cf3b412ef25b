"""Write the tokens of a store as another tool's files, in a format of `formats` that has `write`.

In: an open store. Out: a folder of shards, complete or absent: written under a temporary name, fsynced, read back with our
own reader, compared and renamed. Documents stay whole and in order. Memory: a few blocks of tokens.

In a format without an index every document ends with a token (nanoGPT) or begins with one (llm.c, Automodel): it is added
where it is missing, and moved from the end to the front where the tokenizer has one token for both.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.errors import ConfigError, DataError
from steep.core.files import atomic_folder
from steep.core.say import say_nothing
from steep.core.units import counted
from steep.store.formats import WritableFormat, writable_formats
from steep.store.reader import TokenStore, open_store
from steep.store.token_file import LARGEST_COUNT, Documents, read_in_order
from steep.store.writer import disk_errors

SHARD_TOKENS = 100_000_000
_BLOCK_TOKENS = 1 << 21

Progress = Callable[[int, int], None]
"""Called with tokens of the store done, and in all."""


def write_format(
    store: TokenStore,
    out: Path,
    format: str,
    *,
    shard_tokens: int = SHARD_TOKENS,
    progress: Optional[Progress] = None,
    eos_id: Optional[int] = None,
    bos_id: Optional[int] = None,
    name: str = "train",
    overwrite: bool = False,
) -> list[Path]:
    """Write `store` into the folder `out` and return the .bin files: `<name>.bin`, or `<name>_000000.bin` and so on.

    shard_tokens: a shard is closed before it would hold more, but never within a document. eos_id, bos_id: default those of
    the store's tokenizer. name: the files' name before the number. overwrite: replace an earlier export in `out`.
    Raises ConfigError for an impossible format or number, DataError when ids do not fit, the format cannot keep the documents
    apart, `out` holds something else, or the disk is full; then nothing is left behind.
    """
    writable = writable_formats().get(format)
    if writable is None:
        raise ConfigError(f"format {format!r}: steep writes {', '.join(writable_formats())}.")
    if not 1 <= shard_tokens <= LARGEST_COUNT:
        raise ConfigError(f"shard_tokens={shard_tokens:,}: give a number from 1 to 2,147,483,647.")
    out = Path(out)
    _check_out(out, name, overwrite)
    layout = _make_layout(store, format, writable, eos_id, bos_id)
    written = _Counted()
    with disk_errors(out), atomic_folder(out) as temporary:
        temporary.mkdir()
        documents = _arranged(_document_blocks(store, progress), layout, written)
        names = _write_shards(documents, temporary / name, writable, layout.dtype, shard_tokens)
        _read_back(store, [temporary / file for file in names], format, layout, written)
    return [out / file for file in names]


@dataclass(frozen=True)
class _Layout:
    """How documents are laid out in the format."""

    dtype: np.dtype
    boundary: Optional[int]
    """The token at each document's edge; None: the format has an index."""
    first: bool
    """Whether it comes before the document; one on the other side is moved."""


def _make_layout(
    store: TokenStore, format: str, writable: WritableFormat, eos_id: Optional[int], bos_id: Optional[int]
) -> _Layout:
    noted = store.manifest.get("tokenizer", {})
    eos_id = next((i for i in (eos_id, noted.get("eos_id"), store.eos_id) if i is not None), None)
    bos_id = next((i for i in (bos_id, noted.get("bos_id"), store.bos_id) if i is not None), None)
    boundary = None
    if writable.BOUNDARY_FIRST is not None:
        usual = (bos_id, eos_id) if writable.BOUNDARY_FIRST else (eos_id, bos_id)
        boundary = usual[0] if usual[0] is not None else usual[1]
        if boundary is None:
            raise DataError(
                f"{store.path}: no end-of-text token is known, and {format} files mark documents with nothing else. Name the "
                "tokenizer, prepare the text again with --append-eos, or write megatron files, which have an index."
            )
    largest = max(store.max_token_id, -1 if boundary is None else boundary)
    try:
        dtype = writable.token_dtype(max(largest + 1, noted.get("vocab_size") or 0))
    except DataError as error:
        raise DataError(f"{store.path}: {error}") from None
    return _Layout(dtype, boundary, bool(writable.BOUNDARY_FIRST))


@dataclass
class _Counted:
    """What was written: compared with what is read back."""

    documents: int = 0
    tokens: int = 0
    checksum: int = 0
    """Sum of (position + 1) × (id + 1), modulo 2^64."""


def _write_shards(
    documents: Iterator[Documents], prefix: Path, writable: WritableFormat, dtype: np.dtype, shard_tokens: int
) -> list[str]:
    """Write the shards and return the names of their .bin files; documents without any give one empty shard."""
    names = []
    for number, pieces in itertools.groupby(_shard_pieces(documents, shard_tokens), key=lambda piece: piece[0]):
        names.append(f"{prefix.name}_{number:06d}")
        writable.write(prefix.with_name(names[-1]), dtype, (piece for _, piece in pieces))
    if not names:
        names.append(prefix.name)
        writable.write(prefix, dtype, ())
    elif len(names) == 1:
        for file in list(prefix.parent.glob(f"{glob.escape(names[0])}.*")):
            os.replace(file, file.with_name(prefix.name + file.name.removeprefix(names[0])))
        names = [prefix.name]
    return [f"{name}.bin" for name in names]


def _shard_pieces(documents: Iterator[Documents], shard_tokens: int) -> Iterator[tuple[int, Documents]]:
    """(number of the shard, whole documents) in order. A document longer than `shard_tokens` has a shard of its own."""
    shard = filled = 0
    for lengths, tokens in documents:
        ends = np.cumsum(lengths)
        begin = 0
        while begin < len(lengths):
            before = int(ends[begin - 1]) if begin else 0
            stop = int(np.searchsorted(ends, before + shard_tokens - filled, side="right"))
            if stop <= begin and filled:
                shard, filled = shard + 1, 0
                continue
            stop = max(stop, begin + 1)
            after = int(ends[stop - 1])
            yield shard, (lengths[begin:stop], tokens[before:after])
            filled += after - before
            begin = stop


def checksum(tokens: np.ndarray, first: int) -> int:
    """Sum of (position + 1) × (id + 1) modulo 2^64; `first` is the position of the first token."""
    positions = np.arange(first + 1, first + 1 + len(tokens), dtype=np.uint64)
    return int((positions * (tokens.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64))


def _arranged(documents: Iterator[Documents], layout: _Layout, written: _Counted) -> Iterator[Documents]:
    """Documents as they are written, counted in `written`."""
    for lengths, tokens in documents:
        lengths, tokens = _arrange(lengths, tokens, layout, written.documents)
        written.checksum = (written.checksum + checksum(tokens, written.tokens)) % 2**64
        written.documents += len(lengths)
        written.tokens += len(tokens)
        yield lengths, tokens


def _arrange(lengths: np.ndarray, tokens: np.ndarray, layout: _Layout, first_document: int) -> Documents:
    """Documents with the boundary token where the format has it."""
    boundary = layout.boundary
    if boundary is None or not len(lengths):
        return lengths, tokens
    ends = np.cumsum(lengths)
    starts = ends - lengths
    at_boundary = np.append(tokens == boundary, False)
    has_first = (lengths > 0) & at_boundary[starts]
    has_last = (lengths > 0) & at_boundary[ends - 1]
    alone = has_first & (lengths == 1)
    keep = np.ones(len(tokens), dtype=bool)
    if layout.first:
        there, moved = has_first, has_last & ~alone
        keep[ends[moved] - 1] = False
    else:
        there, moved = has_last, has_first & ~alone
        keep[starts[moved]] = False
    tokens, lengths = tokens[keep], lengths - moved
    ends = np.cumsum(lengths)
    starts = ends - lengths
    count = np.where(lengths > 0, np.add.reduceat(np.append(tokens == boundary, False), starts, dtype=np.int64), 0)
    wrong = np.flatnonzero(count != there)
    if len(wrong):
        raise DataError(
            f"document {first_document + int(wrong[0])} contains the token {boundary}, which would cut it in two in "
            "this format. Write megatron files, which have an index of documents."
        )
    positions = (starts if layout.first else ends)[~there]
    return lengths + ~there, np.insert(tokens, positions, boundary)


def _document_blocks(store: TokenStore, progress: Optional[Progress]) -> Iterator[Documents]:
    """Runs of whole documents of about two million tokens; a longer document by itself."""
    done = 0
    for shard in store.shards:
        lengths = np.asarray(shard.lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        begin = 0
        while begin < len(lengths):
            before = int(ends[begin - 1]) if begin else 0
            stop = max(begin + 1, int(np.searchsorted(ends, before + _BLOCK_TOKENS, side="right")))
            after = int(ends[stop - 1])
            with read_in_order(shard.tokens):
                tokens = shard.read(before, after).astype(np.int64)
            yield lengths[begin:stop], tokens
            done += after - before
            if progress is not None:
                progress(done, store.num_tokens)
            begin = stop


def _read_back(store: TokenStore, paths: list[Path], format: str, layout: _Layout, written: _Counted) -> None:
    """Open what was written with our own reader and compare documents, tokens and a checksum. Raises DataError."""
    first = layout.boundary if layout.first else None
    last = None if layout.first else layout.boundary
    read = open_store(paths, format=format, eos_id=last, bos_id=first, say=say_nothing)
    check = position = 0
    for shard in read.shards:
        for begin, block in shard.file.blocks():
            check = (check + checksum(block, position + begin)) % 2**64
        position += len(shard.tokens)
    found = (read.num_documents, read.num_tokens, check)
    if found != (written.documents, written.tokens, written.checksum) or store.num_documents != written.documents:
        raise DataError(
            f"{paths[0].parent}: read back, the files hold {read.num_documents:,} documents and {read.num_tokens:,} tokens; "
            f"{written.documents:,} and {written.tokens:,} were written. The disk may be damaged, or full."
        )


def _check_out(out: Path, name: str, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder; --out names the folder of the token files.")
    others = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    endings = {re.escape(ending) for writable in writable_formats().values() for ending in writable.ENDINGS}
    written = re.compile(rf"{re.escape(name)}(_\d{{6,}})?({'|'.join(endings)})")
    foreign = [other for other in others if not written.fullmatch(other)]
    if foreign or (others and not overwrite):
        remedy = "Give another folder." if foreign else "Give another folder, or overwrite it."
        raise DataError(
            f"{out}: already holds {counted(len(others), 'file')}, for example {(foreign or others)[0]}. {remedy}"
        )
