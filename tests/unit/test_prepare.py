"""Preparing text: the ledger adds up, bytes depend on the inputs alone, and what is there already is recognised."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.store.cache import cached_store, open_sources
from steep.store.config import PrepareConfig
from steep.store.file_hashes import hash_files
from steep.store.prepare import prepare_sources
from steep.store.reader import open_store
from steep.store.work import divide_into_items, gather_inputs
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


def folder_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_mixed_corpus(folder: Path, documents: list[str]) -> list[SourceConfig]:
    """Text files, one JSONL large enough to be cut, a compressed one, and some bad records."""
    (folder / "pages").mkdir(parents=True)
    for number, text in enumerate(documents[:20]):
        (folder / "pages" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "pages" / "bad.txt").write_bytes(b"\xff\xfe")
    lines = [orjson.dumps({"text": text}) for text in documents] + [b"{", b'{"text": ""}']
    random.Random(5).shuffle(lines)
    (folder / "all.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[:30])))
    return [SourceConfig(path=str(folder / "pages")), SourceConfig(path=str(folder / "*.jsonl*"), name="rest")]


def test_one_and_two_workers_write_the_same_bytes(
    tokenizer: TextTokenizer, documents: list[str], tmp_path: Path
) -> None:
    sources = write_mixed_corpus(tmp_path / "corpus", documents)
    results = [
        prepare_sources(
            sources, tokenizer, tmp_path / f"out{workers}", PrepareConfig(workers=workers, shard_bytes=60_000)
        )
        for workers in (1, 2)
    ]
    hashes = folder_hashes(tmp_path / "out1")
    assert hashes == folder_hashes(tmp_path / "out2")
    assert sum(name.endswith(".bin") for name in hashes) > 8
    assert set(results[0].ledger["dropped"]) == {"not UTF-8", "not JSON", "empty"}
    assert not (tmp_path / "out1" / ".prepare").exists()
    # and the documents stand in reading order: the pages, then the lines of each file
    store = open_store(tmp_path / "out2")
    texts = [tokenizer.decode(store.document(number)[:-1]) for number in range(store.num_documents)]
    lines = [
        orjson.loads(line) for line in (tmp_path / "corpus" / "all.jsonl").read_bytes().split(b"\n") if len(line) > 14
    ]
    assert texts[: 20 + len(lines)] == documents[:20] + [line["text"] for line in lines]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_ledger_accounts_for_every_line(
    data: st.DataObject, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = st.text(min_size=1, max_size=30).filter(lambda text: not text.isspace() and _encodable(text))
    line = st.one_of(
        good.map(lambda text: orjson.dumps({"text": text})),
        st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"?")),
        st.sampled_from(
            [b"{}", b"[]", b'{"text": null}', b'{"text": 5}', b'{"text": " "}', b'{"text": "<|endoftext|>"}', b""]
        ),
    )
    lines = data.draw(st.lists(line, max_size=40))
    folder = tmp_path_factory.mktemp("ledger")
    kept = [orjson.dumps({"text": "always"}), *lines]
    (folder / "a.jsonl").write_bytes(b"\n".join(kept))
    result = prepare_sources(
        [SourceConfig(path=str(folder / "a.jsonl"))],
        tokenizer,
        folder / "out",
        PrepareConfig(workers=1, shard_bytes=97),
    )
    ledger = result.ledger
    rejected_file = folder / "out" / "rejected.jsonl"
    rejected = [json.loads(line) for line in rejected_file.read_text().splitlines()] if rejected_file.exists() else []
    store = open_store(folder / "out")
    assert ledger["records_read"] == sum(1 for line in kept if line.strip(b" \t\r\x0b\x0c"))
    assert ledger["records_read"] == ledger["documents_kept"] + sum(ledger["dropped"].values())
    assert ledger["dropped"] == dict(sorted(Counter(record["reason"] for record in rejected).items()))
    assert ledger["documents_kept"] == store.num_documents == result.documents
    assert ledger["tokens"] == store.num_tokens
    assert store.text_bytes is not None
    assert ledger["text_bytes"] == store.text_bytes.sum()
    assert not any(_is_document(kept[record["line"] - 1]) for record in rejected)
    assert sum(map(_is_document, kept)) == ledger["documents_kept"]


def _is_document(line: bytes) -> bool:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=float.fromhex)  # NaN and Infinity raise
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("text"), str) and bool(value["text"].strip())


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def test_rejected_jsonl_names_file_line_and_reason(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\nnope\n{"text": 1}\n')
    prepare_sources(
        [SourceConfig(path=str(tmp_path / "a.jsonl"))], tokenizer, tmp_path / "out", PrepareConfig(workers=1)
    )
    records = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(record["line"], record["reason"]) for record in records] == [(2, "not JSON"), (3, "wrong type")]
    assert {record["file"] for record in records} == {str(tmp_path / "a.jsonl")}


def test_stop_on_a_bad_record_names_it(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\nnope\n')
    config = PrepareConfig(workers=1, on_bad_record="stop")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        prepare_sources([SourceConfig(path=str(tmp_path / "a.jsonl"))], tokenizer, tmp_path / "out", config)
    # nothing was finished, so the same folder can be used with other settings
    result = prepare_sources(
        [SourceConfig(path=str(tmp_path / "a.jsonl"))], tokenizer, tmp_path / "out", PrepareConfig(workers=1)
    )
    assert result.documents == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "every file is empty"),
        (b'{"title": "x"}\n{"title": "y"}\n{', r"all 3 records.*2 as 'no text field'.*a\.jsonl:1.*'title'"),
    ],
)
def test_no_document_at_all_is_an_error_and_leaves_the_folder_free(
    tokenizer: TextTokenizer, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_sources(
            [SourceConfig(path=str(tmp_path / "a.jsonl"))], tokenizer, tmp_path / "out", PrepareConfig(workers=1)
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_text_that_normalizes_to_nothing_is_dropped_by_name(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    from dataclasses import replace

    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.normalizer = normalizers.Replace("gone", "")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "gone"}\n{"text": "stays"}\n')
    result = prepare_sources(
        [SourceConfig(path=str(tmp_path / "a.jsonl"))], replace(tokenizer, backend=backend), tmp_path / "out"
    )
    assert result.ledger["dropped"] == {"no tokens": 1}
    assert result.documents == 1


def test_a_finished_store_is_found_and_another_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    source, out = SourceConfig(path=str(tmp_path / "a.txt")), tmp_path / "out"
    first = prepare_sources([source], tokenizer, out)
    before = folder_hashes(out)
    again = prepare_sources([source], tokenizer, out, PrepareConfig(workers=2))
    assert (first.already_there, again.already_there) == (False, True)
    assert again.ledger == first.ledger
    assert folder_hashes(out) == before
    assert "already there" in str(again)
    with pytest.raises(DataError, match=r"on_bad_record: skip there, stop now(?s:.*)--overwrite"):
        prepare_sources([source], tokenizer, out, PrepareConfig(on_bad_record="stop"))
    (tmp_path / "a.txt").write_text("other text")
    with pytest.raises(DataError, match="0 of them with the same content"):
        prepare_sources([source], tokenizer, out)
    assert folder_hashes(out) == before
    replaced = prepare_sources([source], tokenizer, out, overwrite=True)
    assert tokenizer.decode(open_store(replaced.path).document(0)[:-1]) == "other text"


def test_foreign_files_are_never_touched(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"not empty.*thesis\.tex"):
            prepare_sources(
                [SourceConfig(path=str(tmp_path / "a.txt"))], tokenizer, tmp_path / "out", overwrite=overwrite
            )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match="is a file"):
        prepare_sources([SourceConfig(path=str(tmp_path / "a.txt"))], tokenizer, tmp_path / "a.txt")


def test_items_are_fixed_by_the_inputs_and_cover_them_once(tmp_path: Path) -> None:
    sizes = [10, 0, 500, 30, 30, 30, 30, 30, 700]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jsonl").write_bytes((b"x" * 9 + b"\n") * (size // 10))
    source = SourceConfig(path=str(tmp_path))
    items = divide_into_items(gather_inputs([source]), [source], 100)
    parts = [part for item in items for part in item.parts]
    assert sum(part.bytes for part in parts) == sum(sizes)
    assert [item.number for item in items] == list(range(len(items)))
    by_file: dict[str, list] = {}
    for part in parts:
        by_file.setdefault(Path(part.path).name, []).append(part.span)
    assert list(by_file) == [f"{number}.jsonl" for number in range(9)]
    assert len(by_file["8.jsonl"]) == 7
    assert all(before[1] == after[0] for before, after in zip(by_file["8.jsonl"], by_file["8.jsonl"][1:], strict=False))
    assert max(item.bytes for item in items) < 200


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_ends_at_the_whole_and_never_goes_back(
    tokenizer: TextTokenizer, documents: list[str], tmp_path: Path, workers: int
) -> None:
    sources = write_mixed_corpus(tmp_path / "corpus", documents)
    calls: list[tuple[int, int, int]] = []
    config = PrepareConfig(workers=workers, shard_bytes=60_000)
    result = prepare_sources(sources, tokenizer, tmp_path / "out", config, lambda *call: calls.append(call))
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1] == (calls[0][1], calls[0][1], result.tokens)


def test_the_cache_is_keyed_by_content_tokenizer_and_settings(
    tokenizer: TextTokenizer, tiny_tokenizer_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    cache = tmp_path / "cache"
    source = SourceConfig(path=str(tmp_path / "a.txt"))
    first = cached_store(source, tokenizer, PrepareConfig(), cache)
    shutil.copytree(tmp_path, tmp_path.parent / "moved", ignore=shutil.ignore_patterns("cache"))
    moved = SourceConfig(path=str(tmp_path.parent / "moved" / "a.txt"), name="another name")
    assert cached_store(moved, tokenizer, PrepareConfig(workers=2), cache) == first
    without_eos = load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory), append_eos=False))
    split = SourceConfig(path=str(tmp_path / "a.txt"), document_separator="blank_lines")
    others = [
        cached_store(source, without_eos, PrepareConfig(), cache),
        cached_store(split, tokenizer, PrepareConfig(), cache),
        cached_store(source, tokenizer, PrepareConfig(on_bad_record="stop"), cache),
    ]
    (tmp_path / "a.txt").write_text("one\n\ntwO")
    others.append(cached_store(source, tokenizer, PrepareConfig(), cache))
    assert len({first, *others}) == 5
    (store,) = open_sources([split], tokenizer, cache_directory=cache)
    assert store.num_documents == 2


def hashes(paths: list[Path], memory: Path | None = None) -> list[str]:
    return [file.sha256 for file in hash_files(paths, memory)]


def test_remembered_hashes_are_used_only_for_files_that_did_not_change(tmp_path: Path) -> None:
    path, memory = tmp_path / "a.txt", tmp_path / "cache" / "hashes.json"
    path.write_text("one")
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    first = hashes([path], memory)
    assert first == [hashlib.sha256(b"one").hexdigest()]
    poisoned = json.loads(memory.read_text())
    next(iter(poisoned.values()))["sha256"] = "remembered"
    memory.write_text(json.dumps(poisoned))
    assert hashes([path], memory) == ["remembered"]  # so the file was not read again
    assert hashes([path]) == first
    path.write_text("two")  # same size, another time
    second = hashes([path], memory)
    assert second == [hashlib.sha256(b"two").hexdigest()]
    memory.write_text(memory.read_text().replace(second[0], "remembered"))
    assert hashes([path], memory) == second  # modified just before it was hashed: read again
    memory.write_text("{")
    assert hashes([path], memory) == second
