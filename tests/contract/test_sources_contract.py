"""What every source format promises, whatever the format: the same texts come out, each record once, places are right."""

from __future__ import annotations

import csv
import gzip
import inspect
import json
import sys
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
from steep.sources.inputs import FORMATS, expand_inputs, known_endings, load_format

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


def write_array(path: Path, texts: list[str]) -> None:
    path.write_bytes(_array_bytes(texts))


def write_array_gz(path: Path, texts: list[str]) -> None:
    raw = _array_bytes(texts)
    path.write_bytes(gzip.compress(raw[:100]) + gzip.compress(raw[100:]))


def write_array_zst(path: Path, texts: list[str]) -> None:
    path.write_bytes(pyarrow.compress(_array_bytes(texts), "zstd", asbytes=True))


def _array_bytes(texts: list[str]) -> bytes:
    records = [{"id": number, "tags": ["]", {"a": "}"}], "text": text} for number, text in enumerate(texts)]
    return json.dumps(records, indent=1).encode()


def write_array_of_texts(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, texts: list[str], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["id", "text", 'a "note"'])
        rows.writerows([number, text, "x"] for number, text in enumerate(texts))


def write_csv_gz(path: Path, texts: list[str]) -> None:
    write_csv(path, texts, ";")
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_tsv(path: Path, texts: list[str]) -> None:
    write_csv(path, texts, "\t")


def write_code(path: Path, texts: list[str]) -> None:
    path.write_text("".join(texts), encoding="utf-8", newline="")  # a file is one document


CASES: list[tuple[str, str, Callable[[Path, list[str]], None], dict[str, str]]] = [
    ("jsonl", "a.jsonl", write_jsonl, {}),
    ("jsonl", "a.jsonl.gz", write_gz, {}),
    ("jsonl", "a.jsonl.zst", write_zst, {}),
    ("parquet", "a.parquet", write_parquet, {}),
    ("plain_text", "a.txt", write_separated, {"document_separator": "\n===\n"}),
    ("json", "a.json", write_array, {}),
    ("json", "b.json.gz", write_array_gz, {}),
    ("json", "b.json.zst", write_array_zst, {}),
    ("json", "texts.json", write_array_of_texts, {}),
    ("json", "lines.json", write_jsonl, {}),
    ("csv", "a.csv", write_csv, {}),
    ("csv", "a.csv.gz", write_csv_gz, {}),
    ("csv", "a.tsv", write_tsv, {}),
    ("code", "a.py", write_code, {}),
]


@pytest.mark.parametrize(("format_name", "name", "write", "options"), CASES, ids=[case[1] for case in CASES])
def test_texts_come_out_as_they_went_in(
    tmp_path: Path, format_name: str, name: str, write: Callable[[Path, list[str]], None], options: dict[str, str]
) -> None:
    path = tmp_path / name
    texts = TEXTS if sys.version_info >= (3, 11) or format_name != "csv" else [t for t in TEXTS if "\0" not in t]
    write(path, texts)
    texts = ["".join(texts)] if format_name == "code" else texts
    config = SourceConfig(path=str(path), **options)
    assert expand_inputs(config)[0].format == format_name
    records = list(load_format(format_name).read(path, config))
    assert all(isinstance(record, Document) for record in records)
    assert [record.text for record in records] == texts
    assert len({record.id for record in records}) == len(texts)
    positions = [record.position for record in records]
    assert positions == sorted(positions)
    assert 0 < positions[-1] <= path.stat().st_size + 2


@pytest.mark.parametrize("part_bytes", [1, 1000, 50_000, 10**9])
@pytest.mark.parametrize(
    ("format_name", "name", "write"), [CASES[0][:3], CASES[3][:3], CASES[9][:3]], ids=["jsonl", "parquet", "json"]
)
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


DAMAGED = [case for case in CASES if case[1].endswith((".gz", ".zst", ".parquet"))]


def test_a_compressed_file_has_no_parts(tmp_path: Path) -> None:
    write_gz(tmp_path / "a.jsonl.gz", TEXTS)
    assert load_format("jsonl").split(tmp_path / "a.jsonl.gz", 10) == []


@pytest.mark.parametrize(("format_name", "name"), [case[:2] for case in CASES], ids=[case[1] for case in CASES])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, format_name: str, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match=name):
        list(load_format(format_name).read(path, SourceConfig(path=str(path))))


@pytest.mark.parametrize(
    ("format_name", "name", "write"), [case[:3] for case in DAMAGED], ids=[case[1] for case in DAMAGED]
)
def test_a_truncated_file_is_named_after_what_could_be_read(
    tmp_path: Path, format_name: str, name: str, write: Callable[[Path, list[str]], None]
) -> None:
    path = tmp_path / name
    write(path, [f"{i} " + json.dumps(list(range(i, i + 400))) for i in range(3000)])
    path.write_bytes(path.read_bytes()[:-20])
    records = load_format(format_name).read(path, SourceConfig(path=str(path)))
    read: list[object] = []
    with pytest.raises(DataError, match=name):
        read.extend(record for record in records)  # `extend` keeps what came before the error
    assert (
        len(read) > 100 or format_name == "parquet"
    )  # the end of a Parquet file is its directory: nothing can be read


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_text_file_that_is_cut_off_ends_in_a_rejected_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (write_array if name == "a.json" else write_csv)(path, [f'{i} "quoted",\n' for i in range(100)])
    path.write_bytes(path.read_bytes()[:-6])
    records = list(load_format(path.suffix[1:]).read(path, SourceConfig(path=str(path))))
    assert sum(isinstance(record, Document) for record in records) == 99
    assert isinstance(records[-1], Rejected)


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
