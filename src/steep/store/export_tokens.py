"""Write the tokens of a store as another tool's files: nanoGPT, llm.c, Automodel, or Megatron without a manifest.

In: an open store. Out: a folder of shards, whole or absent: written under a temporary name, fsynced, read back with our own
reader and compared, renamed. Documents stay whole, in order. Memory: a few blocks of tokens, whatever the store.

The formats know only documents that end with a token (nanoGPT) or begin with one (llm.c, Automodel): it is added where it
is missing, and moved from the end to the front where the tokenizer has one token for both.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Optional

import numpy as np

from steep.core.errors import ConfigError, DataError
from steep.core.files import TEMPORARY_PREFIX, sync_directory, temporary_path
from steep.store.formats import automodel, llm_c
from steep.store.formats.megatron import token_dtype, write_index
from steep.store.reader import TokenStore, open_store
from steep.store.token_file import LARGEST_COUNT, make_header, read_in_order
from steep.store.writer import disk_errors

EXPORT_FORMATS = ("megatron", "nanogpt", "llm_c", "automodel")
SHARD_TOKENS = 100_000_000
_BLOCK_TOKENS = 1 << 21
_U16_IDS = 1 << 16

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
    the store's tokenizer. name: what the files are called before the number. overwrite: replace an earlier export in `out`.
    Raises ConfigError for a format or number that cannot be, DataError when ids do not fit, documents cannot be told apart in
    the format, `out` holds something else, or the disk is full; then nothing is left behind.
    """
    if format not in EXPORT_FORMATS:
        raise ConfigError(f"format {format!r}: steep writes {', '.join(EXPORT_FORMATS)}.")
    if not 1 <= shard_tokens <= LARGEST_COUNT:
        raise ConfigError(f"shard_tokens={shard_tokens:,}: needed is a number from 1 to 2,147,483,647.")
    out = Path(out)
    _check_out(out, name, overwrite)
    _remove_abandoned(out)
    layout = _make_layout(store, format, eos_id, bos_id)
    temporary = temporary_path(out)
    try:
        with disk_errors(out):
            temporary.mkdir(parents=True)
            writer = _Writer(temporary, format, layout, shard_tokens, name)
            for documents, tokens in _document_blocks(store, progress):
                writer.add(documents, tokens)
            names = writer.finish()
            _read_back(store, temporary, names, format, layout, writer)
            sync_directory(temporary)
        _move(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out / file for file in names]


@dataclass(frozen=True)
class _Layout:
    """How documents stand in the format."""

    dtype: np.dtype
    boundary: Optional[int]
    """The token at each document's edge; None: the format has an index."""
    first: bool = False
    """Whether it stands before the document; one that stands on the other side is moved."""


def _make_layout(store: TokenStore, format: str, eos_id: Optional[int], bos_id: Optional[int]) -> _Layout:
    noted = store.manifest.get("tokenizer", {})
    eos_id = next((i for i in (eos_id, noted.get("eos_id"), store.eos_id) if i is not None), None)
    bos_id = next((i for i in (bos_id, noted.get("bos_id"), store.bos_id) if i is not None), None)
    first = format in ("llm_c", "automodel")
    boundary = None
    if format != "megatron":
        boundary = (bos_id if bos_id is not None else eos_id) if first else (eos_id if eos_id is not None else bos_id)
        if boundary is None:
            raise DataError(
                f"{store.path}: nobody noted an end-of-text token, and {format} files mark documents with nothing else. Name the "
                "tokenizer, prepare the text again with --append-eos, or write megatron files, which have an index."
            )
    ids = max(store.max_token_id, -1 if boundary is None else boundary) + 1
    ids = max(ids, noted.get("vocab_size") or 0)
    if format == "megatron":
        dtype = token_dtype(ids)
    elif ids <= _U16_IDS:
        dtype = np.dtype("<u2")
    elif format == "nanogpt":
        raise DataError(
            f"{store.path}: nanoGPT's files hold 16-bit ids, and this tokenizer has {ids:,}. Write llm_c or automodel, which "
            "have 32-bit ids."
        )
    else:
        dtype = np.dtype("<u4")
    return _Layout(dtype, boundary, first)


class _Writer:
    """Shards, one after the other."""

    def __init__(self, folder: Path, format: str, layout: _Layout, shard_tokens: int, name: str):
        self._folder, self._format, self._layout, self._limit, self._name = folder, format, layout, shard_tokens, name
        self._shard: Optional[_OpenShard] = None
        self._names: list[str] = []
        self.num_tokens = 0
        self.num_documents = 0
        self.check = 0
        """Sum of (position + 1) × id over what was written, modulo 2^64: compared with what is read back."""

    def add(self, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Whole documents. lengths: (documents,) int64; tokens: (sum of lengths,) int64."""
        lengths, tokens = _arrange(lengths, tokens, self._layout, self.num_documents)
        ends = np.cumsum(lengths)
        begin = 0
        while begin < len(lengths):
            shard = self._shard or self._new_shard()
            before = int(ends[begin - 1]) if begin else 0
            stop = int(np.searchsorted(ends, before + self._limit - shard.num_tokens, side="right"))
            if stop <= begin and shard.num_tokens:
                self._close()
                continue
            stop = max(stop, begin + 1)  # a document longer than a shard has one of its own
            shard.add(lengths[begin:stop], tokens[before : int(ends[stop - 1])])
            begin = stop
        self.num_documents += len(lengths)
        self.check = (self.check + checksum(tokens, self.num_tokens)) % 2**64
        self.num_tokens += len(tokens)

    def finish(self) -> list[str]:
        """Close the last shard; a store without documents gives one empty shard. Returns the names of the .bin files."""
        if self._shard is None and not self._names:
            self._new_shard()
        self._close()
        if len(self._names) == 1:
            for suffix in (".bin", ".idx", automodel.INDEX_SUFFIX):
                numbered = self._folder / (self._names[0] + suffix)
                if numbered.exists():
                    os.replace(numbered, self._folder / (self._name + suffix))
            self._names = [self._name]
        return [f"{name}.bin" for name in self._names]

    def _new_shard(self) -> _OpenShard:
        name = f"{self._name}_{len(self._names):06d}"
        self._names.append(name)
        self._shard = _OpenShard(self._folder / name, self._format, self._layout.dtype)
        return self._shard

    def _close(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard = None


@dataclass
class _OpenShard:
    """One .bin that is being written, and what goes beside it."""

    prefix: Path
    format: str
    dtype: np.dtype
    num_tokens: int = 0
    lengths: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file: IO[bytes] = open(self._path(".bin"), "wb")  # noqa: SIM115  (closed by close)
        self._file.write(self._header())

    def add(self, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Append whole documents. Raises DataError for a shard that the format cannot hold."""
        self.num_tokens += len(tokens)
        if self.num_tokens > LARGEST_COUNT:
            raise DataError(
                f"a document of {len(tokens):,} tokens is longer than a {self.format} file can be (2,147,483,647 tokens)."
            )
        self._file.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(lengths)

    def close(self) -> None:
        """Put the count into the header and write the index."""
        lengths = np.concatenate(self.lengths) if self.lengths else np.empty(0, dtype=np.int64)
        with self._file as file:
            file.seek(0)
            file.write(self._header())
            _sync(file)
        if self.format == "megatron":
            with open(self._path(".idx"), "wb") as file:
                write_index(file, lengths, self.dtype)
                _sync(file)
        if self.format == "automodel":
            with open(self._path(automodel.INDEX_SUFFIX), "wb") as file:
                file.write((np.cumsum(lengths) - lengths).astype("<i4").tobytes())
                _sync(file)

    def _header(self) -> bytes:
        if self.format == "automodel":
            return make_header(automodel.MAGIC, automodel.VERSION, self.num_tokens, self.dtype.itemsize)
        if self.format == "llm_c" and self.dtype.itemsize == 2:
            return make_header(llm_c.MAGIC_U16, llm_c.VERSION_U16, self.num_tokens)
        if self.format == "llm_c":
            return make_header(llm_c.MAGIC_U32, llm_c.VERSION_U32, self.num_tokens)
        return b""

    def _path(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)


def checksum(tokens: np.ndarray, first: int) -> int:
    """Sum of (position + 1) × (id + 1) modulo 2^64; `first` is the position of the first token."""
    positions = np.arange(first + 1, first + 1 + len(tokens), dtype=np.uint64)
    return int((positions * (tokens.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64))


def _arrange(
    lengths: np.ndarray, tokens: np.ndarray, layout: _Layout, first_document: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents with the boundary token where the format wants it: lengths and tokens as they are written."""
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
            f"document {first_document + int(wrong[0])} holds the token {boundary} inside, which in this format would cut it "
            "in two. Write megatron files, which have an index of documents."
        )
    places = (starts if layout.first else ends)[~there]
    return lengths + ~there, np.insert(tokens, places, boundary)


def _document_blocks(store: TokenStore, progress: Optional[Progress]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs of whole documents of about two million tokens, (lengths, tokens), both int64; a longer document alone."""
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
                tokens = shard.tokens[before:after].astype(np.int64)
            yield lengths[begin:stop], tokens
            done += after - before
            if progress is not None:
                progress(done, store.num_tokens)
            begin = stop


def _read_back(
    store: TokenStore, folder: Path, names: list[str], format: str, layout: _Layout, writer: _Writer
) -> None:
    """Open what was written with our own reader and compare documents, tokens and a checksum. Raises DataError."""
    first = layout.boundary if layout.first else None
    last = None if layout.first else layout.boundary
    paths: list[Path] = [folder / name for name in names]
    written = open_store(paths, format=format, eos_id=last, bos_id=first)
    check = position = 0
    for shard in written.shards:
        for begin, block in shard.file.blocks():
            check = (check + checksum(block, position + begin)) % 2**64
        position += len(shard.tokens)
    found = (written.num_documents, written.num_tokens, check)
    if found != (writer.num_documents, writer.num_tokens, writer.check) or store.num_documents != writer.num_documents:
        raise DataError(
            f"{folder}: read back, the files hold {written.num_documents:,} documents and {written.num_tokens:,} tokens; "
            f"{writer.num_documents:,} and {writer.num_tokens:,} were written. The disk may be damaged, or full."
        )


def _check_out(out: Path, name: str, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is no folder; --out names the folder of the token files.")
    others = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    written = re.compile(rf"{re.escape(name)}(_\d{{6,}})?(\.bin|\.idx|{re.escape(automodel.INDEX_SUFFIX)})")
    foreign = [other for other in others if not written.fullmatch(other)]
    if foreign or (others and not overwrite):
        remedy = "Give another folder." if foreign else "Give another folder, or overwrite it."
        raise DataError(f"{out}: holds {len(others)} file(s) already, for example {(foreign or others)[0]}. {remedy}")


def _remove_abandoned(out: Path) -> None:
    """Delete what killed processes left of earlier attempts at `out`."""
    for path in out.parent.glob(f"{TEMPORARY_PREFIX}*-{glob.escape(out.name)}"):
        owner = path.name.removeprefix(TEMPORARY_PREFIX).split("-")[0]
        if path.is_dir() and owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move(temporary: Path, out: Path) -> None:
    if out.is_dir():
        for path in out.iterdir():
            path.unlink()
    os.replace(temporary, out)
    sync_directory(out.parent)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
