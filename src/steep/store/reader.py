"""Read a token store through memory maps: any range of any document, without loading the rest.

In: a folder with manifest.json, or Megatron .bin/.idx files from any tool. Out: TokenStore. Memory: 16 bytes per document,
and what the operating system keeps of the files.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from steep.core.errors import DataError
from steep.core.files import sha256_file
from steep.core.fingerprint import fingerprint
from steep.store.manifest import (
    MANIFEST_FILE,
    SIDECAR_SUFFIX,
    TOKENIZER_FOLDER,
    add_ledgers,
    has_manifest,
    read_manifest,
)
from steep.store.megatron import Unit, read_index
from steep.store.writer import SIDECAR_DTYPE

_SAMPLE_BYTES = 1 << 20
_SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class Shard:
    """One memory-mapped .bin with its documents."""

    prefix: Path
    tokens: np.ndarray
    """(num_tokens,) view of the file in the dtype on disk."""
    lengths: np.ndarray
    """(documents,) integers, tokens of each document."""
    byte_starts: np.ndarray
    """(documents,) i64, where each begins, in bytes from the first token."""

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.lengths)


class TokenStore:
    """Documents as integers, numbered through all shards from 0."""

    def __init__(self, path: Path, shards: list[Shard], manifest: dict[str, Any]):
        self.path = path
        self.shards = shards
        self.manifest = manifest
        """manifest.json; an empty mapping for stores that other tools wrote."""
        self.document_lengths = _concatenate([shard.lengths for shard in shards], np.int64)
        """(num_documents,) int64, tokens of each document, EOS and BOS included."""
        self.num_documents = len(self.document_lengths)
        self.num_tokens = int(self.document_lengths.sum())
        self._first_documents = [0, *accumulate(shard.num_documents for shard in shards)]

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, documents={self.num_documents:,}, tokens={self.num_tokens:,})"

    def read(self, document: int, start: int, count: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + count) of one document into `out`, (count,) of an integer dtype.

        Raises IndexError for a document or range that the store does not have.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.path}")
        if start < 0 or count < 0 or start + count > self.document_lengths[document]:
            raise IndexError(
                f"tokens [{start}, {start + count}) of {self.document_lengths[document]} in document {document}"
            )
        index = bisect_right(self._first_documents, document) - 1
        shard = self.shards[index]
        first = int(shard.byte_starts[document - self._first_documents[index]]) // shard.tokens.itemsize + start
        out[:] = shard.tokens[first : first + count]

    def document(self, number: int) -> np.ndarray:
        """All tokens of one document: (length,) int64."""
        out = np.empty(int(self.document_lengths[number]), dtype=np.int64)
        self.read(number, 0, len(out), out)
        return out

    @property
    def tokenizer_fingerprint(self) -> Optional[str]:
        """The tokenizer that made the store; None if nobody noted it."""
        return self._tokenizer.get("fingerprint")

    @property
    def eos_id(self) -> Optional[int]:
        """The token after each document; None if there is none or nobody noted it."""
        return self._tokenizer.get("eos_id") if self._tokenizer.get("append_eos") else None

    @property
    def bos_id(self) -> Optional[int]:
        """The token before each document; None if there is none or nobody noted it."""
        return self._tokenizer.get("bos_id") if self._tokenizer.get("prepend_bos") else None

    @property
    def _tokenizer(self) -> dict[str, Any]:
        return self.manifest.get("tokenizer", {})

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the content.

        With a manifest: counts, checksums and tokenizer as noted there (`verify` compares them with the files).
        Without: size of each .bin, SHA-256 of its .idx and of its first and last megabyte, so a change in the middle of a
        large foreign .bin that keeps every length is not noticed.
        """
        if self.manifest:
            return self.manifest["fingerprint"]
        return fingerprint([_foreign_fingerprint(shard.prefix) for shard in self.shards])

    @cached_property
    def max_token_id(self) -> int:
        """The largest id; foreign stores are scanned once."""
        if self.manifest:
            return self.manifest["max_token_id"]
        return max((_largest(shard.tokens) for shard in self.shards), default=-1)

    @cached_property
    def text_bytes(self) -> Optional[np.ndarray]:
        """(num_documents,) int64, UTF-8 bytes of each document's text; None for stores that other tools wrote."""
        sidecar = self._sidecar
        return None if sidecar is None else sidecar["text_bytes"].astype(np.int64)

    @cached_property
    def content_hashes(self) -> np.ndarray:
        """(num_documents,) uint64: of each document's text; for foreign stores of its ids as little-endian int64."""
        sidecar = self._sidecar
        if sidecar is not None:
            return sidecar["content_hash"].astype(np.uint64)
        hashes = (_hash_tokens(self.document(number)) for number in range(self.num_documents))
        return np.fromiter(hashes, dtype=np.uint64, count=self.num_documents)

    @cached_property
    def _sidecar(self) -> Optional[np.ndarray]:
        if not self.manifest:
            return None
        return _concatenate([_read_sidecar(shard) for shard in self.shards], SIDECAR_DTYPE)

    @property
    def tokenizer_directory(self) -> Optional[Path]:
        """The folder with the store's tokenizer, if it is beside the shards."""
        folder = self.path / TOKENIZER_FOLDER
        return folder if folder.is_dir() else None

    def verify(self) -> None:
        """Read every byte and compare with the manifest's checksums. Raises DataError naming the damaged file."""
        if self.manifest:
            _verify_checksums(self.path, self.manifest)


def open_store(path: Union[str, Path], unit: Unit = "documents") -> TokenStore:
    """Open a finished token store: a folder with manifest.json, or what other tools wrote (.bin, .idx or their prefix,
    or a folder of such pairs).

    unit: `sequences` counts every sequence of an .idx as a document, as Megatron's orders do.
    Raises DataError when it is not there, not whole, or damaged in size.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, unit)
    prefix = megatron_prefix(path)
    if prefix is None:
        raise DataError(f"{path}: is no token store (a folder with {MANIFEST_FILE}, or a Megatron .bin and .idx pair).")
    return TokenStore(prefix, [_open_shard(prefix, unit)], {})


def join_stores(stores: list[TokenStore]) -> TokenStore:
    """Several stores as one, in order. Raises DataError if they come from different tokenizers."""
    if len(stores) == 1:
        return stores[0]
    tokenizers = {store.tokenizer_fingerprint for store in stores}
    if len(tokenizers) > 1:
        raise DataError(f"these stores were made with different tokenizers: {', '.join(str(s.path) for s in stores)}")
    shards = [shard for store in stores for shard in store.shards]
    return TokenStore(stores[0].path, shards, _join_manifests(stores))


def is_store(path: Union[str, Path]) -> bool:
    """Whether `path` is a token store: a folder with manifest.json or only .bin/.idx pairs, or a Megatron prefix."""
    path = Path(path).expanduser()
    if path.is_dir():
        return has_manifest(path) or (path / ".prepare").is_dir() or bool(_folder_prefixes(path))
    return megatron_prefix(path) is not None


def megatron_prefix(path: Path) -> Optional[Path]:
    """The common part of a .bin/.idx pair from a path that has .bin, .idx or neither; None if there is no pair."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
    return prefix if all(file.is_file() for file in pair) else None


def _open_folder(folder: Path, unit: Unit) -> TokenStore:
    if has_manifest(folder):
        manifest = read_manifest(folder)
        return TokenStore(folder, [_open_listed_shard(folder, entry) for entry in manifest["shards"]], manifest)
    if (folder / ".prepare").is_dir():
        raise DataError(
            f"{folder}: an unfinished token store. Run the same `steep prepare` again: it continues where it stopped."
        )
    prefixes = _folder_prefixes(folder)
    if not prefixes:
        raise DataError(f"{folder}: is no token store: no {MANIFEST_FILE} and no .bin/.idx pairs.")
    return TokenStore(folder, [_open_shard(prefix, unit) for prefix in prefixes], {})


def _folder_prefixes(folder: Path) -> list[Path]:
    """Prefixes of a folder in which every visible file belongs to a .bin/.idx pair."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]
    prefixes = [megatron_prefix(path) if path.suffix in (".bin", ".idx") else None for path in files]
    if any(prefix is None for prefix in prefixes):
        return []
    return sorted({prefix for prefix in prefixes if prefix is not None})


def _open_listed_shard(folder: Path, entry: dict[str, Any]) -> Shard:
    shard = _open_shard(folder / entry["name"], "documents")
    if (shard.num_documents, len(shard.tokens)) != (entry["documents"], entry["tokens"]):
        raise DataError(
            f"{shard.prefix}.idx: {shard.num_documents:,} documents and {len(shard.tokens):,} tokens, but {MANIFEST_FILE} "
            f"says {entry['documents']:,} and {entry['tokens']:,}. The store is damaged; prepare or copy it again."
        )
    return shard


def _open_shard(prefix: Path, unit: Unit) -> Shard:
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    index = read_index(idx_path, unit)
    if not bin_path.is_file():
        raise DataError(f"{bin_path}: is missing beside {idx_path.name}.")
    size, expected = bin_path.stat().st_size, index.num_tokens * index.dtype.itemsize
    if size != expected:
        raise DataError(
            f"{bin_path}: has {size:,} bytes, but {idx_path.name} describes {index.num_tokens:,} tokens of "
            f"{index.dtype.itemsize} bytes = {expected:,}. It was cut short or is damaged; prepare or copy it again."
        )
    empty = np.empty(0, index.dtype)  # an empty file cannot be mapped
    tokens = np.memmap(bin_path, index.dtype, mode="r").view(np.ndarray) if size else empty
    return Shard(prefix, tokens, index.lengths, index.byte_starts)


def _read_sidecar(shard: Shard) -> np.ndarray:
    path = shard.prefix.with_name(shard.prefix.name + SIDECAR_SUFFIX)
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Prepare or copy the store again.") from error
    if table.dtype != SIDECAR_DTYPE or table.shape != (shard.num_documents,):
        raise DataError(f"{path}: does not describe the {shard.num_documents:,} documents of its shard; it is damaged.")
    return table


def _join_manifests(stores: list[TokenStore]) -> dict[str, Any]:
    if not all(store.manifest for store in stores):
        return {}
    manifests = [store.manifest for store in stores]
    return {
        **manifests[0],
        "fingerprint": fingerprint([store.fingerprint for store in stores]),
        "documents": sum(store.num_documents for store in stores),
        "tokens": sum(store.num_tokens for store in stores),
        "max_token_id": max(store.max_token_id for store in stores),
        "ledger": add_ledgers(manifest["ledger"] for manifest in manifests),
        "sources": [source for manifest in manifests for source in manifest["sources"]],
        "shards": [shard for manifest in manifests for shard in manifest["shards"]],
    }


def _verify_checksums(folder: Path, manifest: dict[str, Any]) -> None:
    suffixes = {"sha256_bin": ".bin", "sha256_idx": ".idx", "sha256_documents": SIDECAR_SUFFIX}
    for entry in manifest["shards"]:
        for key, suffix in suffixes.items():
            path = folder / (entry["name"] + suffix)
            if sha256_file(path) != entry[key]:
                raise DataError(
                    f"{path}: its bytes are not those that {MANIFEST_FILE} lists; prepare or copy it again."
                )


def _foreign_fingerprint(prefix: Path) -> list[Any]:
    bin_path = prefix.with_name(prefix.name + ".bin")
    size = bin_path.stat().st_size
    with open(bin_path, "rb") as file:
        digest = hashlib.sha256(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return [size, sha256_file(prefix.with_name(prefix.name + ".idx")), digest.hexdigest()]


def _largest(tokens: np.ndarray) -> int:
    blocks = (tokens[start : start + _SCAN_TOKENS] for start in range(0, len(tokens), _SCAN_TOKENS))
    return max((int(block.max()) for block in blocks), default=-1)


def _hash_tokens(tokens: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=8).digest(), "little")


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays, dtype=dtype) if arrays else np.empty(0, dtype)
