"""What every source format promises, whatever the format: the same texts come out, each record once, places are right."""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from steep.core.errors import DataError
from steep.core.plugins import plugin_names
from steep.sources.config import TEXT_FORMATS, SourceConfig
from steep.sources.document import Document, Rejected
from steep.sources.formats import TextFormat
from steep.sources.inputs import FORMATS, known_endings, load_format

TEXTS = ["plain", "line one\nline two\n", "Grüße, 世界 🚀", " leading", "nul \0 inside", "x" * 300_000]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_bytes(_jsonl_bytes(texts))


def _jsonl_bytes(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_gz(path: Path, texts: list[str]) -> None:
    raw = _jsonl_bytes(texts)
    path.write_bytes(gzip.compress(raw[:100]) + gzip.compress(raw[100:]))  # two members, as `cat a.gz b.gz` makes


def write_zst(path: Path, texts: list[str]) -> None:
    raw = _jsonl_bytes(texts)
    path.write_bytes(b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (raw[:100], raw[100:])))


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)


def write_separated(path: Path, texts: list[str]) -> None:
    path.write_bytes("\n===\n".join(texts).encode())


CASES: list[tuple[str, str, Callable[[Path, list[str]], None], dict[str, str]]] = [
    ("jsonl", "a.jsonl", write_jsonl, {}),
    ("jsonl", "a.jsonl.gz", write_gz, {}),
    ("jsonl", "a.jsonl.zst", write_zst, {}),
    ("parquet", "a.parquet", write_parquet, {}),
    ("plain_text", "a.txt", write_separated, {"document_separator": "\n===\n"}),
]


@pytest.mark.parametrize(("format_name", "name", "write", "options"), CASES, ids=[case[1] for case in CASES])
def test_texts_come_out_as_they_went_in(
    tmp_path: Path, format_name: str, name: str, write: Callable[[Path, list[str]], None], options: dict[str, str]
) -> None:
    path = tmp_path / name
    write(path, TEXTS)
    config = SourceConfig(path=str(path), **options)
    records = list(load_format(format_name).read(path, config))
    assert all(isinstance(record, Document) for record in records)
    assert [record.text for record in records] == TEXTS
    assert len({record.id for record in records}) == len(TEXTS)
    positions = [record.position for record in records]
    assert positions == sorted(positions)
    assert 0 < positions[-1] <= path.stat().st_size + 2


@pytest.mark.parametrize("part_bytes", [1, 1000, 50_000, 10**9])
@pytest.mark.parametrize(("format_name", "name", "write"), [CASES[0][:3], CASES[3][:3]], ids=["jsonl", "parquet"])
def test_parts_joined_are_the_whole(
    tmp_path: Path, format_name: str, name: str, write: Callable[[Path, list[str]], None], part_bytes: int
) -> None:
    path, config = tmp_path / name, SourceConfig(path="x")
    texts = [f"document {i} " * (i % 7 + 1) for i in range(40)] + ["", "after an empty one"]
    write(path, texts)
    module = load_format(format_name)
    whole = list(module.read(path, config))
    spans = module.split(path, part_bytes)
    assert spans[0][0] == 0
    if part_bytes == 1:
        assert len(spans) > 10
    parts = [record for span in spans for record in module.read(path, config, span)]
    key = lambda record: (record.file, record.line) if isinstance(record, Rejected) else (record.text, record.id)  # noqa: E731
    assert list(map(key, parts)) == list(map(key, whole))
    assert len(whole) == 42


def test_a_compressed_file_has_no_parts(tmp_path: Path) -> None:
    write_gz(tmp_path / "a.jsonl.gz", TEXTS)
    assert load_format("jsonl").split(tmp_path / "a.jsonl.gz", 10) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    format_name = {".txt": "plain_text", ".parquet": "parquet"}.get(path.suffix, "jsonl")
    with pytest.raises(DataError, match=name):
        list(load_format(format_name).read(path, SourceConfig(path=str(path))))


@pytest.mark.parametrize(
    ("name", "write"), [(case[1], case[2]) for case in CASES[1:4]], ids=[case[1] for case in CASES[1:4]]
)
def test_a_truncated_file_is_named_after_what_could_be_read(
    tmp_path: Path, name: str, write: Callable[[Path, list[str]], None]
) -> None:
    path = tmp_path / name
    write(path, [f"{i} " + json.dumps(list(range(i, i + 400))) for i in range(3000)])
    path.write_bytes(path.read_bytes()[:-20])
    format_name = "parquet" if path.suffix == ".parquet" else "jsonl"
    records = load_format(format_name).read(path, SourceConfig(path=str(path)))
    read: list[object] = []
    with pytest.raises(DataError, match=name):
        read.extend(record for record in records)  # `extend` keeps what came before the error
    assert (
        len(read) > 100 or format_name == "parquet"
    )  # the end of a Parquet file is its directory: nothing can be read


@pytest.mark.parametrize("name", plugin_names(FORMATS))
def test_it_has_what_the_protocol_promises(name: str) -> None:
    for member in ("read", "split"):
        promised = list(inspect.signature(getattr(TextFormat, member)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(load_format(name), member)).parameters) == promised


def test_every_format_has_endings_and_no_ending_has_two_formats() -> None:
    names = plugin_names(FORMATS)
    assert {case[0] for case in CASES} == {*TEXT_FORMATS} == {*names} - {"hub"}  # tests/unit/test_sources_hub.py
    endings = [ending for name in names for ending in load_format(name).ENDINGS]
    assert len(endings) == len(set(endings)) == len(known_endings())
