"""Reading token stores: ranges, shards, sidecars, checksums, and what a store says about itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from steep.core.errors import ConfigError, DataError
from steep.sources.config import SourceConfig
from steep.store.cache import check_tokenizer, open_sources, store_paths
from steep.store.config import PrepareConfig
from steep.store.formats.megatron import write_index
from steep.store.inspect import COUNTED_TOKENS, count_ids, fertility, inspect_store, length_histogram
from steep.store.prepare import prepare_sources
from steep.store.reader import TokenStore, is_store, join_stores, open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer, make_text_tokenizer
from steep.tokenizer.open import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


@pytest.fixture(scope="module")
def store_path(corpus_directory: Path, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    prepare_sources(
        [SourceConfig(path=str(corpus_directory))], tokenizer, out, PrepareConfig(workers=1, shard_bytes=100_000)
    )
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
    with pytest.raises(DataError, match="not a manifest of a steep token store"):
        open_store(copy)
    (copy / "manifest.json").write_text(json.dumps({"format": "steep token store", "version": 99}))
    with pytest.raises(DataError, match="newer"):
        open_store(copy)
    with pytest.raises(DataError, match="not a token store"):
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


def test_inspect_is_json_and_shows_documents(store_path: Path, store: TokenStore, documents: list[str]) -> None:
    found = json.loads(json.dumps(inspect_store(store_path)))
    assert found["documents"] == len(documents)
    assert found["length_quantiles"]["min"] >= 2
    assert len(found["examples"]) == 5
    for example in found["examples"]:
        assert documents[example["document"]].startswith(example["text"].removesuffix("<|endoftext|>"))
        assert example["tokens"] == store.document_lengths[example["document"]]
    assert found["bytes_per_token"] > 1
    foreign = json.loads(json.dumps(inspect_store(store_path / "shard_00000")))
    assert foreign["examples"][0]["text"] is None
    assert foreign["written_by"] == "another tool (megatron)"


def test_inspect_counts_ids_as_numpy_does(store_path: Path, store: TokenStore, tokenizer: TextTokenizer) -> None:
    ids = inspect_store(store_path)["ids"]
    tokens = np.concatenate([shard.tokens for shard in store.shards])
    numbers, counts = np.unique(tokens, return_counts=True)
    assert (ids["counted_tokens"], ids["whole_store"], ids["different"]) == (store.num_tokens, True, len(numbers))
    assert ids["never_used"]["ids"] == tokenizer.vocab_size - len(numbers)
    assert ids["beyond_the_tokenizer"] == 0
    assert "unknown" not in ids  # a byte-level BPE has none
    top = ids["most_frequent"][0]
    assert (top["count"], top["id"]) == (counts.max(), numbers[counts.argmax()])
    assert top["text"] == tokenizer.decode([top["id"]])
    assert len(ids["most_frequent"]) == 10


def test_inspects_histogram_and_fertility_add_up(
    store_path: Path, store: TokenStore, documents: list[str], tokenizer: TextTokenizer
) -> None:
    found = inspect_store(store_path)
    bins = found["length_histogram"]
    assert sum(entry["documents"] for entry in bins) == store.num_documents
    assert sum(entry["tokens"] for entry in bins) == store.num_tokens
    lengths = store.document_lengths
    for entry in bins:
        assert entry["documents"] == ((lengths >= entry["from"]) & (lengths <= entry["to"])).sum()
    assert length_histogram(np.array([0, 1, 1, 4])) == [
        {"from": 0, "to": 0, "documents": 1, "tokens": 0},
        {"from": 1, "to": 1, "documents": 2, "tokens": 2},
        {"from": 2, "to": 3, "documents": 0, "tokens": 0},
        {"from": 4, "to": 7, "documents": 1, "tokens": 4},
    ]
    few = fertility(store, tokenizer)
    assert few is not None
    assert few == found["fertility"]
    ids = tokenizer.encode(documents[0])
    own = len(ids) / len(documents[0].split())
    assert few["tokens_per_word"] == pytest.approx(own, rel=0.35)
    assert few["bytes_per_token"] == pytest.approx(found["bytes_per_token"], rel=0.1)


def test_the_documents_shown_follow_the_seed(store_path: Path) -> None:
    shown = [[e["document"] for e in inspect_store(store_path, seed=seed)["examples"]] for seed in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2]


def test_a_large_store_is_counted_in_evenly_spread_pieces(tmp_path: Path) -> None:
    """2^29 tokens, sparse: zeros, and one 7 in every 2^20."""
    num_tokens = 1 << 29
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(2 * num_tokens)
        for position in range(0, num_tokens, 1 << 22):
            file.seek(2 * position)
            file.write(b"\7\0")
    with open(tmp_path / "a.idx", "wb") as file:
        write_index(file, np.full(1 << 9, 1 << 20), np.dtype("<u2"))
    found = count_ids(open_store(tmp_path / "a"))
    assert not found.whole
    assert found.num_tokens == COUNTED_TOKENS
    assert found.counts[7] == num_tokens >> 22


def test_unknown_ids_are_counted_for_tokenizers_that_have_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = make_text_tokenizer(backend, bos_id=None, eos_id=None, append_eos=False, prepend_bos=False)
    np.array(words.encode("a b x y a"), dtype="<u2").tofile(tmp_path / "a.bin")
    ids = inspect_store(tmp_path / "a.bin", tokenizer=words, format="nanogpt")["ids"]
    assert ids["unknown"] == {"id": 0, "count": 2, "share": 0.4}
    assert ids["never_used"] == {"ids": 1, "of": 4, "share": 0.25}
    np.array([1, 9], dtype="<u2").tofile(tmp_path / "b.bin")
    ids = inspect_store(tmp_path / "b.bin", tokenizer=words, format="nanogpt")["ids"]
    assert ids["beyond_the_tokenizer"] == 1


def test_inspect_of_foreign_files_shows_text_by_the_tokenizer_given(
    tiny_tokenizer_directory: Path, tokenizer: TextTokenizer, documents: list[str], tmp_path: Path
) -> None:
    from steep.inspection import inspect, store_as_text

    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in documents[:20]]
    np.array([i for document in ids for i in document], dtype="<u2").tofile(tmp_path / "train.bin")
    found = inspect(tmp_path / "train.bin", tokenizer=str(tiny_tokenizer_directory), verify=True)
    assert found["documents"] == 20
    assert found["written_by"] == "another tool (nanogpt)"
    assert "no checksums" in found["verified"]
    assert documents[found["examples"][0]["document"]].startswith(found["examples"][0]["text"])
    shown = store_as_text(found)
    assert "each ends with token" in shown
    assert "tokens per word" in shown
    assert "never used" in shown
    assert "█" in shown
    with pytest.raises(ConfigError, match="format 'gpt'"):
        inspect(tmp_path / "train.bin", format="gpt")


def test_verify_notices_a_changed_manifest_a_missing_file_and_another_tokenizer(copy: Path) -> None:
    assert inspect_store(copy, verify=True)["verified"].startswith("every file equals")
    policy = copy / "tokenizer" / "steep_tokenizer.json"
    whole = policy.read_text()
    policy.write_text(whole.replace('"append_eos": true', '"append_eos": false'))
    with pytest.raises(DataError, match=r"steep_tokenizer\.json: its bytes"):
        inspect_store(copy, verify=True)
    manifest = json.loads((copy / "manifest.json").read_text())
    for key in ("checksum", "files"):  # as an earlier steep wrote it
        del manifest[key]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is another tokenizer"):
        inspect_store(copy, verify=True)
    policy.write_text(whole)
    (copy / "manifest.json").write_text(json.dumps({**manifest, "tokens": manifest["tokens"] + 1}))
    with pytest.raises(DataError, match=r"manifest\.json: says"):
        open_store(copy).verify()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "shard_00001.documents.npy").unlink()
    with pytest.raises(DataError, match=r"shard_00001\.documents\.npy: cannot be read"):
        open_store(copy).verify()


def test_sources_that_are_stores_are_used_as_they_are(
    store_path: Path, store: TokenStore, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    sources = [SourceConfig(path=str(store_path)), SourceConfig(path=str(store_path / "*.bin"))]
    own, foreign = open_sources(sources, tokenizer, cache_directory=tmp_path)
    assert own.fingerprint == store.fingerprint
    assert foreign.num_tokens == own.num_tokens
    assert np.array_equal(foreign.document(30), own.document(30))
    assert list(tmp_path.iterdir()) == []
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
    with pytest.raises(DataError, match="is not a token store"):
        store_paths(SourceConfig(path=str(corpus_directory), format="store"))
