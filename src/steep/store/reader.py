"""Read a token store through memory maps: any range of any document, without loading the rest.

In: a folder with manifest.json, or files of the other tools in `formats`. Out: TokenStore.
Memory: 8 bytes per document, 16 more where documents had to be found, and what the operating system caches of the files.
"""

from __future__ import annotations

import contextlib
import os
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from steep.core.errors import DataError
from steep.core.files import sha256_file
from steep.core.fingerprint import fingerprint
from steep.core.say import Say, tell
from steep.store.blocks import BlockCheck
from steep.store.boundaries import largest_id
from steep.store.detect import as_asked, token_file, token_files
from steep.store.formats import formats
from steep.store.formats.megatron import open_pair
from steep.store.manifest import (
    MANIFEST_FILE,
    PREPARE_FOLDER,
    SIDECAR_SUFFIX,
    TOKENIZER_FOLDER,
    add_ledgers,
    has_manifest,
    read_manifest,
    remedy,
)
from steep.store.shard import Shard, ShardOpener, Unit
from steep.store.token_file import map_of, read_in_order
from steep.store.writer import SIDECAR_DTYPE, content_hash

SPARE_FILES = 512


class TokenStore:
    """Documents as integers, numbered through all shards from 0."""

    def __init__(self, path: Path, shards: list[Shard], manifest: dict[str, Any]):
        self.path = path
        self.shards = shards
        self.manifest = manifest
        """manifest.json; empty for stores that other tools wrote."""
        self.open_ended: frozenset[int] = frozenset()
        """Documents whose last token is followed by another one, which is not theirs to predict: pieces (`CutStore`)."""
        self.cache_directory: Optional[Path] = None
        """Where results of passes over large foreign files are kept; None: the usual folder."""
        lengths = [shard.lengths for shard in shards]
        self.document_lengths = np.concatenate([np.empty(0, np.int64), *lengths], dtype=np.int64)
        """(num_documents,) int64, tokens of each document, EOS and BOS included."""
        self.num_documents = len(self.document_lengths)
        self.num_tokens = int(self.document_lengths.sum())
        self._first_documents = [0, *accumulate(shard.num_documents for shard in shards)]

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, documents={self.num_documents:,}, tokens={self.num_tokens:,})"

    def read(self, document: int, start: int, count: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + count) of one document into `out`, (count,) of an integer dtype.

        Raises IndexError for a document or range outside the store.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.path}")
        if start < 0 or count < 0 or start + count > self.document_lengths[document]:
            raise IndexError(
                f"tokens [{start}, {start + count}) of {self.document_lengths[document]} in document {document}"
            )
        index = bisect_right(self._first_documents, document) - 1
        shard = self.shards[index]
        first = int(shard.starts[document - self._first_documents[index]]) // shard.starts_unit + start
        out[:] = shard.read(first, first + count)

    def document(self, number: int) -> np.ndarray:
        """All tokens of one document: (length,) int64."""
        out = np.empty(int(self.document_lengths[number]), dtype=np.int64)
        self.read(number, 0, len(out), out)
        return out

    @property
    def tokenizer_fingerprint(self) -> Optional[str]:
        """The tokenizer that made the store; None if it is not known."""
        return self._tokenizer.get("fingerprint")

    @property
    def eos_id(self) -> Optional[int]:
        """The token after each document; None if there is none or it is not known."""
        if self.manifest:
            return self._tokenizer.get("eos_id") if self._tokenizer.get("append_eos") else None
        return self._boundary_token(first=False)

    @property
    def bos_id(self) -> Optional[int]:
        """The token before each document; None if there is none or it is not known."""
        if self.manifest:
            return self._tokenizer.get("bos_id") if self._tokenizer.get("prepend_bos") else None
        return self._boundary_token(first=True)

    def _boundary_token(self, *, first: bool) -> Optional[int]:
        found = {shard.boundary for shard in self.shards}
        boundary = found.pop() if len(found) == 1 else None
        return boundary.token if boundary is not None and boundary.first == first else None

    @property
    def _tokenizer(self) -> dict[str, Any]:
        return self.manifest.get("tokenizer", {})

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the content.

        With a manifest: of the counts, checksums and tokenizer noted there (`verify` compares them with the files).
        Without one: of each file's size, first and last megabyte, and where its documents begin, so a change in the middle
        of a large foreign file that keeps every length is not noticed. Paths and times do not matter.
        """
        if self.manifest:
            return self.manifest["fingerprint"]
        return fingerprint([shard.content() for shard in self.shards])

    @cached_property
    def file_fingerprints(self) -> dict[str, str]:
        """Path of each file of tokens -> what identifies its content, in order: to say which file changed."""
        noted = {entry["name"]: entry["sha256_bin"] for entry in self.manifest.get("shards", [])}
        return {str(shard.path): noted.get(shard.prefix.name) or fingerprint(shard.content()) for shard in self.shards}

    @cached_property
    def max_token_id(self) -> int:
        """The largest id; foreign stores are read through once. Raises DataError for a negative one."""
        if self.manifest:
            return self.manifest["max_token_id"]
        return max((largest_id(shard.file, self.cache_directory) for shard in self.shards), default=-1)

    @cached_property
    def text_bytes(self) -> Optional[np.ndarray]:
        """(num_documents,) int64, UTF-8 bytes of each document's text; None for stores that other tools wrote."""
        sidecar = self._sidecar
        return None if sidecar is None else sidecar["text_bytes"].astype(np.int64)

    @cached_property
    def content_hashes(self) -> np.ndarray:
        """(num_documents,) uint64: a hash of each document's text; for foreign stores, of its ids as little-endian int64."""
        sidecar = self._sidecar
        if sidecar is not None:
            return sidecar["content_hash"].astype(np.uint64)
        documents = (self.document(number) for number in range(self.num_documents))
        hashes = (content_hash(ids.astype("<i8").tobytes()) for ids in documents)
        with contextlib.ExitStack() as stack:
            for shard in self.shards:
                stack.enter_context(read_in_order(shard.tokens))
            return np.fromiter(hashes, dtype=np.uint64, count=self.num_documents)

    @cached_property
    def _sidecar(self) -> Optional[np.ndarray]:
        if not self.manifest:
            return None
        sums = [entry["sha256_documents"] for entry in self.manifest["shards"]]
        return np.concatenate([np.empty(0, SIDECAR_DTYPE), *map(_read_sidecar, self.shards, sums)])

    @property
    def tokenizer_directory(self) -> Optional[Path]:
        """The folder with the store's tokenizer, if it is beside the shards."""
        folder = self.path / TOKENIZER_FOLDER
        return folder if folder.is_dir() else None

    def verify(self) -> None:
        """Read every byte and compare with the manifest's checksums. Raises DataError naming the damaged file.

        Without a manifest there are none. Sizes and indices were checked when the store was opened; here every id is read.
        """
        if not self.manifest:
            _ = self.max_token_id
            return
        listed = self.manifest["shards"]
        suffixes = {"sha256_bin": ".bin", "sha256_idx": ".idx", "sha256_documents": SIDECAR_SUFFIX}
        for shard, entry in zip(self.shards, listed, strict=True):
            for key, suffix in suffixes.items():
                _check_listed(shard.prefix.with_name(entry["name"] + suffix), entry[key])
        for name, sha256 in self.manifest.get("files", {}).items():
            _check_listed(self.path / name, sha256)
        documents, tokens = (sum(entry[key] for entry in listed) for key in ("documents", "tokens"))
        if (documents, tokens) != (self.manifest["documents"], self.manifest["tokens"]):
            raise DataError(
                f"{self.path / MANIFEST_FILE}: says {self.manifest['documents']:,} documents and "
                f"{self.manifest['tokens']:,} tokens, but its shards have {documents:,} and {tokens:,}; it was edited. "
                "Prepare or copy the store again."
            )


def open_store(
    path: Union[str, Path, Sequence[Union[str, Path]]],
    unit: Unit = "documents",
    *,
    format: str = "auto",
    eos_id: Optional[int] = None,
    bos_id: Optional[int] = None,
    cache_directory: Optional[Path] = None,
    say: Say = tell,
) -> TokenStore:
    """Open a finished token store in place: a folder with manifest.json, or what another tool wrote: a token file of a format
    in `formats`, a file that belongs to one, a Megatron prefix, or a folder of such files.

    path: several are joined, in order. unit: `sequences` counts every sequence of an .idx as a document, as Megatron does.
    format: one of `formats()`, instead of judging the files by their first bytes. eos_id, bos_id: of the tokenizer that made
    them, by which documents are found in files without an index. Their positions are kept in `cache_directory`.
    say: told what was assumed. Raises DataError for a store that does not exist, is not complete, or has the wrong size.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    opener = ShardOpener(unit, eos_id, bos_id, cache_directory, format if format in formats() else None)
    store = join_stores([_open(Path(one).expanduser(), opener) for one in paths])
    opener.say_notes(say)
    store.cache_directory = cache_directory
    return store


def _open(path: Path, opener: ShardOpener) -> TokenStore:
    if path.is_dir():
        return _open_folder(path, opener)
    entry = token_file(path)
    if opener.asked_for is not None and path.is_file():
        entry = as_asked(path, opener.asked_for)
    if entry is None:
        kinds = f"a folder with {MANIFEST_FILE}, or files of {', '.join(formats())}"
        is_half = path.suffix == ".idx" and path.is_file()  # of a Megatron pair
        missing = f"; {path.with_suffix('.bin').name} is missing beside it" if is_half else ""
        raise DataError(f"{path}: is not a token store ({kinds}){missing}.")
    _allow_open_files(1)
    file, file_format = entry
    shard = formats()[file_format].open(file, opener)
    return TokenStore(shard.path if shard.index_path is None else shard.prefix, [shard], {})


def join_stores(stores: list[TokenStore]) -> TokenStore:
    """Several stores as one, in order. Raises DataError if they come from different tokenizers."""
    if len(stores) == 1:
        return stores[0]
    tokenizers = {store.tokenizer_fingerprint for store in stores}
    if len(tokenizers) > 1:
        raise DataError(f"these stores were made with different tokenizers: {', '.join(str(s.path) for s in stores)}")
    shards = [shard for store in stores for shard in store.shards]
    if not all(store.manifest for store in stores):
        return TokenStore(stores[0].path, shards, {})
    manifests = [store.manifest for store in stores]
    joined = {
        **manifests[0],
        "fingerprint": fingerprint([store.fingerprint for store in stores]),
        "documents": sum(store.num_documents for store in stores),
        "tokens": sum(store.num_tokens for store in stores),
        "max_token_id": max(store.max_token_id for store in stores),
        "ledger": add_ledgers(manifest["ledger"] for manifest in manifests),
        "sources": [source for manifest in manifests for source in manifest["sources"]],
        "shards": [shard for manifest in manifests for shard in manifest["shards"]],
        "files": {},  # those of each store are compared when it is opened by itself
    }
    return TokenStore(stores[0].path, shards, joined)


def is_store(path: Union[str, Path]) -> bool:
    """Whether `path` is a token store: a folder with manifest.json or only token files, a token file, or a Megatron prefix."""
    path = Path(path).expanduser()
    if path.is_dir():
        return has_manifest(path) or (path / PREPARE_FOLDER).is_dir() or bool(token_files(path))
    return token_file(path) is not None


def _open_folder(folder: Path, opener: ShardOpener) -> TokenStore:
    if has_manifest(folder):
        manifest = read_manifest(folder)
        _allow_open_files(len(manifest["shards"]))
        shards = [_open_listed_shard(folder, entry, manifest["dtype"], opener.unit) for entry in manifest["shards"]]
        return TokenStore(folder, shards, manifest)
    if (folder / PREPARE_FOLDER).is_dir():
        raise DataError(
            f"{folder}: an unfinished token store. Run the same `steep prepare` again: it continues where it stopped."
        )
    files = token_files(folder, opener.asked_for)
    if not files:
        raise DataError(f"{folder}: is not a token store: no {MANIFEST_FILE}, and other files than token files.")
    _allow_open_files(len(files))
    if opener.asked_for is not None:
        files = [as_asked(path, opener.asked_for) for path, _ in files]
    shards = [formats()[file_format].open(path, opener) for path, file_format in files]
    return TokenStore(folder, shards, {})


def _open_listed_shard(folder: Path, entry: dict[str, Any], dtype: str, unit: Unit) -> Shard:
    shard = open_pair(folder / entry["name"], unit)
    if (shard.num_documents, len(shard.tokens)) != (entry["documents"], entry["tokens"]):
        raise DataError(
            f"{shard.prefix}.idx: {shard.num_documents:,} documents and {len(shard.tokens):,} tokens, but {MANIFEST_FILE} "
            f"says {entry['documents']:,} and {entry['tokens']:,}. The store is damaged; prepare or copy it again."
        )
    if shard.file.dtype != np.dtype(dtype):
        raise DataError(
            f"{shard.prefix}.idx: its ids are {shard.file.dtype.name}, and {MANIFEST_FILE} says {dtype}. {remedy(folder)}"
        )
    _check_listed(Path(f"{shard.prefix}.idx"), entry["sha256_idx"])
    content, listed = map_of(shard.tokens), entry.get("xxh3_blocks")
    if content is None or listed is None:  # an empty shard, or one of an earlier steep
        return shard
    return replace(shard, blocks=BlockCheck(shard.path, content, shard.starts_unit, listed, remedy(folder)))


def _check_listed(path: Path, sha256: str) -> None:
    """Raise DataError unless a whole file has the checksum that the manifest lists."""
    try:
        found = sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Prepare or copy the store again.") from error
    if found != sha256:
        raise DataError(f"{path}: its bytes are not those that {MANIFEST_FILE} lists. {remedy(path.parent)}")


def _read_sidecar(shard: Shard, sha256: str) -> np.ndarray:
    path = shard.prefix.with_name(shard.prefix.name + SIDECAR_SUFFIX)
    _check_listed(path, sha256)
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Prepare or copy the store again.") from error
    if table.dtype != SIDECAR_DTYPE or table.shape != (shard.num_documents,):
        raise DataError(f"{path}: does not describe the {shard.num_documents:,} documents of its shard; it is damaged.")
    if table["text_bytes"].min(initial=0) < 0:
        raise DataError(
            f"{path}: document {int(table['text_bytes'].argmin())} has a negative size. {remedy(path.parent)}"
        )
    return table


def _allow_open_files(num_files: int) -> None:
    """Raise this process's limit so that `num_files` more can be open: every memory-mapped shard counts as one, and the usual
    1,024 is too few for a large store. Beyond the hard limit opening fails with the system's message.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptor = os.open(os.devnull, os.O_RDONLY)  # the next one: about that many files are open
    os.close(descriptor)
    needed = descriptor + num_files + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = 2 * needed if hard == resource.RLIM_INFINITY else min(2 * needed, hard)
        if limit > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
