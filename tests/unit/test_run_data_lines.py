"""What a person is told of a run's texts before it starts: dropped records, whatever they come from, and progress."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from steep.config.load import load_run_config
from steep.core.errors import DataError
from steep.core.progress import Progress
from steep.data.open import RunData, follow_streams, open_run_data
from steep.data.preparing import OverAllTexts
from steep.sources.config import SourceConfig
from steep.sources.inputs import read_texts
from steep.store.prepare import prepare_sources
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_tokenizer
from support import run_mapping


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """Every third record has its text in another field, one line is Latin-1, one is too long."""
    path = tmp_path_factory.mktemp("corpus") / "mixed.jsonl"
    lines = [json.dumps({"id": "x", "text" if n % 3 else "body": text}).encode() for n, text in enumerate(documents)]
    path.write_bytes(b"\n".join([*lines, b'{"text": "caf\xe9"}', b'{"text": "' + b"x" * 200_000 + b'"}', b""]))
    return path


def opened(mapping: dict[str, Any], tokenizer: TextTokenizer, lines: list[str], **options: Any) -> RunData:
    return open_run_data(load_run_config(mapping=mapping), tokenizer, lines.append, **options)


@pytest.mark.parametrize("kind", ["text", "cache", "store"])
def test_each_source_has_one_line_on_what_was_dropped(
    kind: str, corpus: Path, tokenizer: TextTokenizer, tiny_tokenizer_directory: Path, tmp_path: Path, documents: list[str]
) -> None:  # fmt: skip
    source: dict[str, Any] = {"path": str(corpus), "max_record_bytes": 100_000}
    if kind == "store":
        prepare_sources([SourceConfig(**source)], tokenizer, tmp_path / "store")
        source = {"path": str(tmp_path / "store")}
    mapping = run_mapping(tmp_path, corpus.parent, tiny_tokenizer_directory)
    mapping["data"] |= {"train": [source], "validation": {"same": source}, "cache_directory": str(tmp_path / "cache")}
    for _ in range(2 if kind == "cache" else 1):
        lines: list[str] = []
        opened(mapping, tokenizer, lines)
    lost = len(range(0, len(documents), 3))
    [line] = [line for line in lines if "dropped" in line]
    assert line.startswith(
        f"{Path(source['path']).name}: {lost + 2:,} of {len(documents) + 2:,} records were dropped: {lost:,} no text"
    )
    for part in ("1 not UTF-8 (17 B)", "1 too long (195.", "text_key: body", "rejected.jsonl"):
        assert part in line


def test_texts_that_are_read_at_once_say_it_too(corpus: Path, documents: list[str]) -> None:
    lines: list[str] = []
    texts = read_texts(str(corpus), lines.append)
    assert texts[: len(documents) - len(range(0, len(documents), 3))] == [t for n, t in enumerate(documents) if n % 3]
    [line] = lines
    assert "records were dropped" in line
    assert "text_key: body" in line
    (corpus.parent / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"holds no document .*1 of 1 records were dropped: 1 not UTF-8"):
        read_texts(str(corpus.parent / "latin.txt"))


def test_a_stream_says_it_of_its_first_records_and_while_it_is_read(
    corpus: Path, tokenizer: TextTokenizer, tiny_tokenizer_directory: Path, tmp_path: Path
) -> None:
    mapping = run_mapping(tmp_path, corpus.parent, tiny_tokenizer_directory)
    mapping["data"] |= {"train": [{"path": str(corpus), "stream": True}], "validation": {}}
    mapping["train"].pop("epochs", None)
    mapping["train"]["steps"] = 2
    lines: list[str] = []
    data = opened(mapping, tokenizer, lines)
    [line] = [line for line in lines if "dropped" in line]
    assert "records read as a sample were dropped" in line
    assert "text_key: body" in line
    said: list[str] = []
    follow_streams(data, said.append)
    for number in range(6):
        data.stores[0].ranges(number)  # type: ignore[union-attr]
    assert said[0].startswith("mixed.jsonl: 1 record of the stream dropped so far: 1 no text field (")
    assert [line.split()[1] for line in said] == [str(10**n) for n in range(len(said))]
    [line] = data.dropped_of_streams(6)
    assert "records read so far were dropped" in line
    again: list[str] = []
    data.begin_streams(data.stream_cursors(6), [6], again.append)
    assert again == [line]


def test_progress_is_over_all_texts_and_ends_at_the_total(
    tokenizer: TextTokenizer, tiny_tokenizer_directory: Path, corpus: Path, tmp_path: Path, documents: list[str]
) -> None:
    for name, texts in (("a", documents[::2]), ("b", documents)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    mapping = run_mapping(tmp_path, corpus.parent, tiny_tokenizer_directory)
    sources = [{"path": str(tmp_path / f"{name}.jsonl.gz")} for name in "ab"]
    mapping["data"] |= {"train": sources, "validation": {"held": {"path": str(corpus)}}}
    mapping["data"]["cache_directory"] = str(tmp_path / "cache")
    calls: list[tuple[int, int, int]] = []
    opened(mapping, tokenizer, [], progress=lambda *call: calls.append(call))
    total = sum((tmp_path / f"{name}.jsonl.gz").stat().st_size for name in "ab") + corpus.stat().st_size
    assert calls == sorted(calls)
    assert {call[1] for call in calls} == {total}
    assert calls[-1][0] == total


def test_a_total_that_was_not_known_grows() -> None:
    calls: list[tuple[int, int, int]] = []
    over_all = OverAllTexts([], lambda *call: calls.append(call))
    over_all(5, 10, 1)
    assert calls == [(5, 10, 1)]
    progress = Progress("preparing", 10, "bytes")
    progress.update(20, 40)
    assert "(50 %)" in progress.line()
