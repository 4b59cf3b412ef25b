"""Reading token stores: ranges, shards, sidecars, checksums, and what a store says about itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.store.cache import check_tokenizer, describe_source, open_sources, store_paths
from steep.store.config import PrepareConfig
from steep.store.inspect import inspect_store
from steep.store.prepare import prepare
from steep.store.reader import TokenStore, is_store, join_stores, open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


@pytest.fixture(scope="module")
def store_path(corpus_directory: Path, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    prepare([SourceConfig(path=str(corpus_directory))], tokenizer, out, PrepareConfig(workers=1, shard_bytes=100_000))
    return out


@pytest.fixture
def store(store_path: Path) -> TokenStore:
    return open_store(store_path)


@pytest.fixture
def copy(store_path: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(store_path, tmp_path / "copy"))


def test_documents_come_back_with_eos(store: TokenStore, tokenizer: TextTokenizer, documents: list[str]) -> None:
    assert len(store.shards) > 2
    assert store.num_documents == len(documents)
    for number, text in enumerate(documents):
        ids = store.document(number)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[:-1]) == text
    assert store.num_tokens == store.document_lengths.sum() == sum(shard.tokens.size for shard in store.shards)


def test_ranges_equal_slices_of_whole_documents(store: TokenStore) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        number = int(rng.integers(store.num_documents))
        length = int(store.document_lengths[number])
        start = int(rng.integers(length + 1))
        count = int(rng.integers(length - start + 1))
        out = np.full(count, -1, dtype=np.int64)
        store.read(number, start, count, out)
        assert np.array_equal(out, store.document(number)[start : start + count])


@pytest.mark.parametrize(
    ("document", "start", "count"), [(-1, 0, 1), (10**6, 0, 1), (0, -1, 1), (0, 0, 10**9), (0, 0, -1)]
)
def test_what_is_not_there_raises(store: TokenStore, document: int, start: int, count: int) -> None:
    with pytest.raises(IndexError):
        store.read(document, start, count, np.empty(max(0, min(count, 10)), np.int64))


def test_sidecar_holds_bytes_and_hashes_of_the_text(store: TokenStore, documents: list[str]) -> None:
    raw = [text.encode() for text in documents]
    assert store.text_bytes is not None
    assert store.text_bytes.tolist() == [len(text) for text in raw]
    digests = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in raw]
    assert store.content_hashes.tolist() == digests
    assert store.content_hashes.dtype == np.uint64


def test_what_a_store_says_of_itself(store: TokenStore, tokenizer: TextTokenizer) -> None:
    assert store.tokenizer_fingerprint == tokenizer.fingerprint
    assert (store.eos_id, store.bos_id) == (tokenizer.eos_id, None)
    assert store.max_token_id == max(int(shard.tokens.max()) for shard in store.shards)
    ledger = store.manifest["ledger"]
    assert ledger["records_read"] == ledger["documents_kept"] == store.num_documents
    assert ledger["tokens"] == store.num_tokens
    assert store.text_bytes is not None
    assert ledger["text_bytes"] == store.text_bytes.sum()
    store.verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents.npy"])
def test_verify_names_the_file_with_a_changed_byte(copy: Path, suffix: str) -> None:
    path = copy / f"shard_00001{suffix}"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"shard_00001{suffix}"):
        open_store(copy).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents.npy"])
def test_a_missing_or_shortened_file_is_named(copy: Path, suffix: str) -> None:
    path = copy / f"shard_00001{suffix}"
    raw = path.read_bytes()
    path.write_bytes(raw[:-2])
    with pytest.raises(DataError, match=f"shard_00001{suffix}"):
        open_store(copy).content_hashes  # noqa: B018  (the sidecar is read when it is needed)
    path.unlink()
    with pytest.raises(DataError, match=f"shard_00001{suffix}"):
        open_store(copy).content_hashes  # noqa: B018


def test_a_shard_of_another_store_is_noticed(copy: Path) -> None:
    for suffix in (".bin", ".idx", ".documents.npy"):
        (copy / f"shard_00000{suffix}").write_bytes((copy / f"shard_00001{suffix}").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000\.idx.*manifest\.json says"):
        open_store(copy)


def test_manifests_that_are_none_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        open_store(copy)
    (copy / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(DataError, match="no manifest of a steep token store"):
        open_store(copy)
    (copy / "manifest.json").write_text(json.dumps({"format": "steep token store", "version": 99}))
    with pytest.raises(DataError, match="newer"):
        open_store(copy)
    with pytest.raises(DataError, match="no token store"):
        open_store(tmp_path / "nothing")


def test_without_its_manifest_the_same_tokens_open_as_foreign(copy: Path, store: TokenStore) -> None:
    assert is_store(copy)
    foreign = open_store(copy / "shard_00002.bin")
    first = int(sum(shard.num_documents for shard in store.shards[:2]))
    assert np.array_equal(foreign.document(0), store.document(first))


def test_joined_stores_are_one_after_the_other(store: TokenStore) -> None:
    joined = join_stores([store, store])
    assert joined.num_documents == 2 * store.num_documents
    assert np.array_equal(joined.document(store.num_documents + 3), store.document(3))
    assert joined.text_bytes is not None
    assert len(joined.text_bytes) == joined.num_documents
    assert joined.fingerprint != store.fingerprint
    assert joined.tokenizer_fingerprint == store.tokenizer_fingerprint


def test_inspect_is_json_and_shows_documents(store_path: Path, documents: list[str]) -> None:
    found = json.loads(json.dumps(inspect_store(store_path)))
    assert found["documents"] == len(documents)
    assert found["length_quantiles"]["min"] >= 2
    assert len(found["examples"]) == 5
    assert documents[0].startswith(found["examples"][0]["text"])
    assert found["bytes_per_token"] > 1
    foreign = json.loads(json.dumps(inspect_store(store_path / "shard_00000")))
    assert foreign["examples"][0]["text"] is None
    assert foreign["examples"][0]["first_ids"] == found["examples"][0]["first_ids"]


def test_sources_that_are_stores_are_used_as_they_are(
    store_path: Path, store: TokenStore, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    sources = [SourceConfig(path=str(store_path)), SourceConfig(path=str(store_path / "*.bin"))]
    own, foreign = open_sources(sources, tokenizer, cache_directory=tmp_path)
    assert own.fingerprint == store.fingerprint
    assert foreign.num_tokens == own.num_tokens
    assert np.array_equal(foreign.document(30), own.document(30))
    assert list(tmp_path.iterdir()) == []
    assert "token store" in describe_source(sources[0])
    assert len(store_paths(sources[1])) == len(store.shards)


def test_a_store_of_another_tokenizer_is_refused_with_both_names(
    store_path: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer
) -> None:
    other = load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory), append_eos=False))
    with pytest.raises(
        DataError, match=f"{tokenizer.fingerprint[:12]}(?s:.*)append_eos True(?s:.*){other.fingerprint[:12]}"
    ):
        open_sources([SourceConfig(path=str(store_path))], other)


def test_a_foreign_store_with_ids_beyond_the_tokenizer_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    from steep.store.writer import open_shard

    with open_shard(tmp_path, "big", np.dtype(np.uint16)) as writer:
        writer.add(np.array([5, 600]), "x")
    with pytest.raises(DataError, match="token id 600"):
        check_tokenizer(open_store(tmp_path / "big"), tokenizer)


def test_text_and_stores_do_not_mix_in_one_source(store_path: Path, corpus_directory: Path) -> None:
    with pytest.raises(DataError, match="give them as two sources"):
        store_paths(SourceConfig(path=[str(store_path), str(corpus_directory)]))
    with pytest.raises(DataError, match="is no token store"):
        store_paths(SourceConfig(path=str(corpus_directory), format="store"))
