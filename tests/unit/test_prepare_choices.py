"""Which documents become the store: limits, duplicates, contamination and shards; for any number of workers, the same bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig
from steep.store.contamination import RUN_WORDS
from steep.store.duplicates import SHINGLE_WORDS, alike, repeated, signatures_of
from steep.store.prepare import prepare_sources
from steep.store.prepare_result import PrepareResult
from steep.store.reader import TokenStore, open_store
from steep.store.word_hashes import CHUNK_BYTES, run_hashes, runs_within, word_hashes, word_hashes_of
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_tokenizer

SHARD_BYTES = 60_000
SETTINGS: list[dict[str, Any]] = [
    {"max_tokens": 40_000},
    {"max_tokens": 40_000, "shard_tokens": 7_000, "min_tokens": 300},
    {"dedup": "exact"},
    {"dedup": "exact", "max_tokens": 90_000},
    {"dedup": "minhash", "max_tokens_per_document": 5_000},
    {"shard_tokens": 10_000},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


@pytest.fixture(scope="module")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 0.9 MB of JSONL: every document twice, the second time in another place, and bad lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for _ in range(2) for text in documents] + ["{", "[]", ""]
    random.Random(3).shuffle(lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def folder_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(path: Path, tokenizer: TextTokenizer, out: Path, workers: int = 1, **changes: Any) -> PrepareResult:
    config = PrepareConfig(**{"workers": workers, "shard_bytes": SHARD_BYTES, **changes})
    return prepare_sources([SourceConfig(path=str(path))], tokenizer, out, config)


def texts_of(store: TokenStore, tokenizer: TextTokenizer) -> list[str]:
    return [tokenizer.decode(store.document(number)[:-1]) for number in range(store.num_documents)]


def check_ledger(result: PrepareResult) -> None:
    """Everything read is kept or dropped for a reason, and every dropped record has its line."""
    ledger, store = result.ledger, open_store(result.path)
    file = result.path / "rejected.jsonl"
    rejected = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert ledger["records_read"] == ledger["documents_kept"] + sum(ledger["dropped"].values())
    assert ledger["dropped"] == dict(sorted(Counter(record["reason"] for record in rejected).items()))
    assert (ledger["documents_kept"], ledger["tokens"]) == (store.num_documents, store.num_tokens)
    assert ledger["text_bytes"] == store.text_bytes.sum()  # type: ignore[union-attr]
    store.verify()


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: "-".join(changes))
def test_one_and_two_workers_choose_the_same(
    corpus: Path, tokenizer: TextTokenizer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    results = [run(corpus, tokenizer, tmp_path / f"out{workers}", workers, **changes) for workers in (1, 2)]
    assert folder_hashes(tmp_path / "out1") == folder_hashes(tmp_path / "out2")
    assert list((tmp_path / "out1").rglob(".*")) == []
    check_ledger(results[0])
    again = run(corpus, tokenizer, tmp_path / "out1", **changes)
    assert again.already_there


def test_max_tokens_stops_with_the_document_that_reaches_it(
    corpus: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    whole = open_store(run(corpus, tokenizer, tmp_path / "whole").path)
    totals = np.cumsum(whole.document_lengths)
    for max_tokens in (1, int(totals[20]), int(totals[20]) + 1):
        result = run(corpus, tokenizer, tmp_path / f"out{max_tokens}", max_tokens=max_tokens)
        store = open_store(result.path)
        expected = int(np.searchsorted(totals, max_tokens)) + 1
        assert store.document_lengths.tolist() == whole.document_lengths[:expected].tolist()
        assert all(np.array_equal(store.document(n), whole.document(n)) for n in range(expected))
        assert result.ledger["not_used"]["bytes"] > 0
        assert "not used: the last" in str(result)
        check_ledger(result)
    result = run(corpus, tokenizer, tmp_path / "more", max_tokens=10**9)
    assert open_store(result.path).fingerprint == whole.fingerprint
    assert "not_used" not in result.ledger


def test_max_tokens_does_not_read_what_it_does_not_need(
    documents: list[str], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}.jsonl").write_text(json.dumps({"text": documents[number] * 3}))
    seen: list[int] = []
    config = PrepareConfig(workers=1, shard_bytes=20_000, max_tokens=1000)
    result = prepare_sources([SourceConfig(path=str(tmp_path / "*.jsonl"))], tokenizer, tmp_path / "out", config,
                     lambda done, total, tokens: seen.append(done))  # fmt: skip
    total = sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    assert result.ledger["records_read"] < 10
    assert max(seen) < total / 2


def test_exact_dedup_keeps_the_first_and_counts_the_rest(
    corpus: Path, documents: list[str], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in corpus.read_text().splitlines() if len(line) > 4]
    expected = list(dict.fromkeys(line["text"] for line in lines))
    plain = run(corpus, tokenizer, tmp_path / "plain")
    chosen = run(corpus, tokenizer, tmp_path / "chosen", workers=2, dedup="exact")
    assert texts_of(open_store(chosen.path), tokenizer) == expected
    repeats = len(lines) - len(expected)
    assert plain.ledger["exact_duplicates"]["documents"] == chosen.ledger["dropped"]["duplicate"] == repeats
    assert plain.ledger["exact_duplicates"]["tokens"] == chosen.ledger["dropped_tokens"]["duplicate"]
    assert chosen.ledger["exact_duplicates"] == {"documents": 0, "tokens": 0}
    assert "repeat an earlier one word for word; --dedup exact drops them" in str(plain)
    rejected = [json.loads(line) for line in (chosen.path / "rejected.jsonl").read_text().splitlines()]
    raw = corpus.read_text().split("\n")
    for record in rejected:
        if record["reason"] == "duplicate":
            match = re.fullmatch(r"the same text as document ([\d,]+) of the store", record["detail"])
            assert match is not None
            assert json.loads(raw[record["line"] - 1])["text"] == expected[int(match[1].replace(",", ""))]


def test_minhash_drops_what_is_nearly_the_same_and_nothing_else(
    documents: list[str], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    generator = random.Random(5)
    words = sorted({word for text in documents for word in text.split()})
    originals = [" ".join(generator.choices(words, k=400)) for _ in range(40)]
    copies = []
    for text in originals:
        changed = text.split()
        for place in generator.sample(range(len(changed)), 4):  # at most 20 of 396 runs of 5 words differ
            changed[place] = "different"
        copies.append(" ".join(changed).upper().replace(" ", " , ", 30))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*originals, *copies]))
    result = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", dedup="minhash")
    assert texts_of(open_store(result.path), tokenizer) == originals
    assert result.ledger["dropped"] == {"near duplicate": 40}
    check_ledger(result)


def signature(words: np.ndarray) -> np.ndarray:
    return signatures_of(words, np.array([len(words)]))[0]


def jaccard(left: list[str], right: list[str]) -> float:
    one, other = (
        {tuple(w[at : at + SHINGLE_WORDS]) for at in range(len(w) - SHINGLE_WORDS + 1)} for w in (left, right)
    )
    return len(one & other) / len(one | other)


def test_signatures_estimate_the_share_of_common_runs() -> None:
    """Against the measure itself: the error of 128 values is 0.044 at most (standard deviation), its mean over 60 pairs 0.006."""
    generator = random.Random(1)
    errors = []
    for _ in range(60):
        left = [str(generator.randrange(10**6)) for _ in range(500)]
        right = left[:]
        for place in generator.sample(range(500), generator.randrange(1, 120)):
            right[place] = "x"
        found = [signature(word_hashes(" ".join(words))) for words in (left, right)]
        errors.append((found[0] == found[1]).mean() - jaccard(left, right))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06


def test_groups_of_near_duplicates_have_their_first_as_original() -> None:
    generator = np.random.default_rng(2)
    base = generator.integers(0, 2**32, (3, 128), dtype=np.uint32)
    rows = np.stack([base[0], base[1], base[0], base[2], base[1], base[0]])
    rows[2, 100:104] += 1
    hashes, alive = np.arange(6, dtype=np.uint64), np.ones(6, dtype=bool)
    assert alike([rows[:2], rows[2:]], hashes, alive).tolist() == [-1, -1, 0, -1, 1, 0]
    alive[0] = False  # dropped before: neither original nor duplicate
    assert alike([rows], hashes, alive).tolist() == [-1, -1, -1, -1, 1, 2]


def test_documents_without_words_are_compared_by_their_content(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    texts = ["...", "???", "...", "one", "One!", "two"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    result = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", dedup="minhash")
    assert texts_of(open_store(result.path), tokenizer) == ["...", "???", "one", "two"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30), st.data())
def test_repeated_finds_the_first(values: list[int], data: st.DataObject) -> None:
    alive = [data.draw(st.booleans()) for _ in values]
    expected = []
    for number, value in enumerate(values):
        before = [at for at in range(number) if values[at] == value and alive[at]]
        expected.append(before[0] if before and alive[number] else -1)
    assert repeated(np.array(values, dtype=np.uint64), np.array(alive, dtype=bool)).tolist() == expected


def words_of(text: str) -> list[bytes]:
    """The definition, by a regular expression."""
    raw = re.sub("[\u2000-\u203f]", " ", text.lower()).encode()
    return re.findall(rb"[a-z0-9\x80-\xff]+", raw)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("aB9é—’.,-_\n 世", max_size=12), max_size=8))
def test_words_are_those_of_the_definition(pieces: list[str]) -> None:
    text = " ".join(pieces)
    names: dict[bytes, int] = {}
    for word, value in zip(words_of(text), word_hashes(text).tolist(), strict=True):
        assert names.setdefault(word, value) == value
    assert len(set(names.values())) == len(names)


def test_words_of_long_texts_do_not_depend_on_where_they_are_cut() -> None:
    text = "some words of seven kinds in turn " * (CHUNK_BYTES // 12)
    hashes = word_hashes(text)
    assert len(hashes) == len(text.split())
    assert len(np.unique(hashes)) == 7
    assert len(word_hashes("a" * (CHUNK_BYTES + 5))) == 2  # a word longer than a part is cut


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefg"), max_size=40).map(" ".join), max_size=12))
def test_many_texts_at_once_are_each_text_by_itself(texts: list[str]) -> None:
    words, counts = word_hashes_of(texts)
    alone = [word_hashes(text) for text in texts]
    assert counts.tolist() == [len(hashes) for hashes in alone]
    assert words.tolist() == [value for hashes in alone for value in hashes.tolist()]
    assert signatures_of(words, counts).tolist() == [signature(hashes).tolist() for hashes in alone]
    begins = np.cumsum([0, *counts])
    expected = [begin + at for begin, count in zip(begins, counts, strict=False) for at in range(count - 12)]
    assert runs_within(counts, 13).tolist() == expected


def test_runs_are_equal_where_their_words_are() -> None:
    words = word_hashes("a b c a b c a b d")
    runs = run_hashes(words, 3)
    assert [runs.tolist().index(value) for value in runs.tolist()] == [0, 1, 2, 0, 1, 2, 6]
    assert len(run_hashes(words, 10)) == 0


@pytest.fixture(scope="module")
def evaluation(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two evaluation texts: some sentences of the corpus in other clothes, and something else."""
    folder = tmp_path_factory.mktemp("evaluation")
    sentences = [" ".join(documents[number].split()[30:60]) for number in (5, 60, 0)]
    (folder / "seen.jsonl").write_text("\n".join(json.dumps({"text": text.upper()}) for text in [*sentences, "short"]))
    (folder / "other.txt").write_text("entirely new words that nobody wrote before " * 4)
    return [folder / "seen.jsonl", folder / "other.txt"]


def runs_of(text: str) -> set[tuple[bytes, ...]]:
    words = words_of(text)
    return {tuple(words[at : at + RUN_WORDS]) for at in range(len(words) - RUN_WORDS + 1)}


@pytest.mark.parametrize("drop", [False, True])
def test_contamination_is_what_comparing_all_runs_finds(
    documents: list[str], tokenizer: TextTokenizer, evaluation: list[Path], tmp_path: Path, drop: bool
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    seen = [runs_of(json.loads(line)["text"]) for line in evaluation[0].read_text().splitlines()]
    guilty = [number for number, text in enumerate(documents) if runs_of(text) & set().union(*seen)]
    assert len(guilty) >= 3
    paths = [str(path) for path in evaluation]
    result = run(
        tmp_path / "a.jsonl", tokenizer, tmp_path / "out", workers=2, check_against=paths, drop_contaminated=drop
    )
    found = [json.loads(line) for line in (result.path / "contaminated.jsonl").read_text().splitlines()]
    assert [record["line"] - 1 for record in found] == guilty
    assert {record["evaluation_text"] for record in found} == {paths[0]}
    runs_seen = set().union(*seen)
    words = [words_of(documents[number]) for number in guilty]
    shared = [sum(tuple(w[at : at + 13]) in runs_seen for at in range(len(w))) for w in words]
    assert [record["shared_runs"] for record in found] == shared
    report = result.ledger["contamination"]
    assert (report["documents"], [text["contaminated"] for text in report["texts"]]) == (len(guilty), [len(guilty), 0])
    assert [(text["documents"], text["too_short"]) for text in report["texts"]] == [(4, 1), (1, 0)]
    kept = [text for number, text in enumerate(documents) if not drop or number not in guilty]
    assert texts_of(open_store(result.path), tokenizer) == kept
    assert result.ledger["dropped"] == ({"contaminated": len(guilty)} if drop else {})
    assert f"{len(guilty):,} documents" in str(result)
    check_ledger(result)


def test_an_evaluation_text_that_cannot_be_checked_is_an_error(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "short.txt").write_text("too short to be found")
    with pytest.raises(DataError, match=r"short\.txt: holds no document of at least 13 words"):
        run(tmp_path / "a.txt", tokenizer, tmp_path / "out", check_against=[str(tmp_path / "short.txt")])


def test_changed_evaluation_texts_make_another_store(
    tokenizer: TextTokenizer, evaluation: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    run(tmp_path / "a.txt", tokenizer, tmp_path / "out", check_against=[str(evaluation[0])])
    with pytest.raises(DataError, match="check_against: "):
        run(tmp_path / "a.txt", tokenizer, tmp_path / "out", check_against=[str(evaluation[1])])
    with pytest.raises(DataError, match="check_against: .* there, None now"):
        run(tmp_path / "a.txt", tokenizer, tmp_path / "out")


def test_shards_hold_at_most_so_many_tokens_and_whole_documents(
    corpus: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    whole = open_store(run(corpus, tokenizer, tmp_path / "whole").path)
    for shard_tokens in (1, 3000, 10**9):
        store = open_store(run(corpus, tokenizer, tmp_path / f"out{shard_tokens}", shard_tokens=shard_tokens).path)
        assert store.document_lengths.tolist() == whole.document_lengths.tolist()
        assert np.array_equal(store.content_hashes, whole.content_hashes)
        shards = store.manifest["shards"]
        assert all(shard["tokens"] <= shard_tokens or shard["documents"] == 1 for shard in shards)
        assert [shard["name"] for shard in shards] == [f"shard_{number:05d}" for number in range(len(shards))]
        assert len(shards) == {1: store.num_documents, 10**9: 1}.get(shard_tokens, len(shards))
        assert all(a["tokens"] + b["tokens"] > shard_tokens for a, b in itertools.pairwise(shards))


def test_lengths_are_limited_in_tokens_as_stored(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    texts = ["a", "ab ab ab ab ab ab ab", "the same of some length"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
    low, high = min(lengths) + 1, max(lengths) - 1
    result = run(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", min_tokens=low, max_tokens_per_document=high)
    assert result.ledger["dropped"] == {"over max_tokens_per_document": 1, "under min_tokens": 1}
    assert result.ledger["dropped_tokens"] == {"over max_tokens_per_document": max(lengths), "under min_tokens": 2}
    rejected = [json.loads(line) for line in (result.path / "rejected.jsonl").read_text().splitlines()]
    assert rejected[0]["detail"] == f"2 tokens; min_tokens is {low}"
    with pytest.raises(DataError, match="no document is left: of 3 records 3 were dropped as 'under min_tokens'"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path / "none", min_tokens=1000)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_ledger_accounts_for_every_line_whatever_is_chosen(
    data: st.DataObject, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    line = st.sampled_from(["one", "two words", "three short words", "{", "", "one " * 30, "…", "two words."])
    lines = data.draw(st.lists(line, min_size=1, max_size=30))
    folder = tmp_path_factory.mktemp("ledger")
    encoded = [text if text in ("{", "") else json.dumps({"text": text}) for text in ["always", *lines]]
    (folder / "a.jsonl").write_text("\n".join(encoded))
    changes = {
        "max_tokens": data.draw(st.sampled_from([None, 1, 20, 60])),
        "max_tokens_per_document": data.draw(st.sampled_from([None, 20])),
        "dedup": data.draw(st.sampled_from([None, "exact", "minhash"])),
        "shard_tokens": data.draw(st.sampled_from([None, 1, 25])),
    }
    result = run(folder / "a.jsonl", tokenizer, folder / "out", shard_bytes=50, **changes)
    check_ledger(result)
    if changes["max_tokens"] is None:
        assert result.ledger["records_read"] == sum(1 for text in encoded if text)
