"""JSON arrays, CSV and TSV, byte by byte; and what a person is told of records that were dropped."""

from __future__ import annotations

import csv as standard_csv
import io
import json as standard_json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.sources.document import (
    EMPTY,
    NO_FIELD,
    NOT_CSV,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    WRONG_TYPE,
    Document,
    Rejected,
)
from steep.sources.dropped import DroppedCount, dropped_line
from steep.sources.formats import json, parquet
from steep.sources.inputs import expand_inputs, load_format


def outcome(records: list[Document | Rejected]) -> list[object]:
    return [record.text if isinstance(record, Document) else (record.line, record.reason) for record in records]


def read_bytes(path: Path, content: bytes, **options: object) -> list[Document | Rejected]:
    path.write_bytes(content)
    config = SourceConfig.model_validate({"path": str(path), **options})
    return list(load_format(expand_inputs(config)[0].format).read(path, config))


JSON_CASES: dict[str, tuple[bytes, list[object]]] = {
    "texts and records": (b'["one", {"text": "two"}]', ["one", "two"]),
    "over lines, with a byte order mark": (b'\xef\xbb\xbf\r\n [\n{\n"text": "one"\n}\n,"two"\n]\n', ["one", "two"]),
    "brackets and quotes in texts": (b'[{"text": "}]\\"[{"}, "\\\\", "\\\\\\"]"]', ['}]"[{', "\\", '\\"]']),
    "no array, objects over lines": (b'{\n"text": "one"\n}\n{"text":\n"two"}', ["one", "two"]),
    "one object": (b'{\n  "text": "one"\n}\n', ["one"]),
    "JSON Lines, the first damaged": (b'{"text": "one\n{"text": "two"}\n', [(1, NOT_JSON), "two"]),
    "a damaged record in the middle": (b'["one", {"text": }, {"text": 1 2}, "two"]',
                                       ["one", (2, NOT_JSON), (3, NOT_JSON), "two"]),
    "values that are no text": (b'[1, null, ["x"], {"a": 1}, "", NaN, {"text": 3}, "x"]',
                                [(1, NO_FIELD), (2, NO_FIELD), (3, NO_FIELD), (4, NO_FIELD), (5, EMPTY), (6, NO_FIELD),
                                 (7, WRONG_TYPE), "x"]),
    "NaN in another field": (b'[{"score": NaN, "text": "x"}, {"score": 1e400, "text": "y"}]', ["x", "y"]),
    "Latin-1": (b'["caf\xe9", "x"]', [(1, NOT_UTF8), "x"]),
    "a record that is too long": (b'["one", {"text": "' + b"y" * 3000 + b'"}, "two"]', ["one", (2, TOO_LONG), "two"]),
    "cut off between records": (b'["one", "two",', ["one", "two", (3, NOT_JSON)]),
    "cut off in a record": (b'["one", {"text": "tw', ["one", (2, NOT_JSON)]),
    "something after the array": (b'["one"] x', ["one", (2, NOT_JSON)]),
    "an empty array": (b"[]", []),
    "nothing": (b"", []),
}  # fmt: skip


@pytest.mark.parametrize("what", JSON_CASES)
@pytest.mark.parametrize("block_bytes", [4, 7, 1 << 20])
def test_json_files(what: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "BLOCK_BYTES", block_bytes)  # values across blocks at nearly every byte
    content, expected = JSON_CASES[what]
    found = outcome(read_bytes(tmp_path / "a.json", content, max_record_bytes=2000))
    assert found == expected


@given(
    st.lists(
        st.one_of(st.text(st.characters(exclude_categories=("Cs",))), st.lists(st.dictionaries(st.text(), st.text())))
    )
)
@settings(max_examples=60, deadline=None)
def test_the_values_of_any_array_are_those_of_a_parser(values: list[object]) -> None:
    for indent in (None, 1):
        raw = standard_json.dumps(values, indent=indent, ensure_ascii=indent is None).encode("utf-8", "replace")
        parts = json.Values(io.BytesIO(raw), 10**9).read()
        assert [standard_json.loads(part) for part in parts if isinstance(part, bytes)] == standard_json.loads(raw)


CSV_CASES: dict[str, tuple[str, bytes, list[object]]] = {
    "quotes, commas and line ends in a field": ("a.csv", b'id,text\n1,"a, ""b""\r\nc"\n2,d\n', ['a, "b"\r\nc', "d"]),
    "CRLF, a byte order mark, blank lines": ("a.csv", b"\xef\xbb\xbftext,id\r\n\r\none,1\r\n\r\ntwo,2\r\n", ["one", "two"]),
    "semicolons": ("a.csv", b"id;text\n1;one, two\n", ["one, two"]),
    "tabs": ("a.tsv", b"id\ttext\n1\tone, two\n", ["one, two"]),
    "one column": ("a.csv", b"text\none\ntwo\n", ["one", "two"]),
    "a comma without quotes": ("a.csv", b"id,text\n1,one\n2,two, three\n3,four\n", ["one", (3, NOT_CSV), "four"]),
    "a row that is short": ("a.csv", b"text,id\none,1\ntwo\nthree,3\n", ["one", (3, NOT_CSV), "three"]),
    "text after a quote": ("a.csv", b'id,text\n1,"one" x\n2,"two\nlines" x\n3,x\n', [(2, NOT_CSV), (3, NOT_CSV), "x"]),
    "a quote in a field without quotes": ("a.csv", b'id,text\n1,5" pipe\n', ['5" pipe']),
    "a quote that is never closed": ("a.csv", b'id,text\n1,one\n2,"two\n3,three\n', ["one", (3, NOT_CSV)]),
    "Latin-1": ("a.csv", b"id,text\n1,caf\xe9\n2,x\n", [(2, NOT_UTF8), "x"]),
    "Latin-1 in another field": ("a.csv", b"id,text\ncaf\xe9,x\n", ["x"]),
    "an empty field": ("a.csv", b"id,text\n1,\n2, \n3,x\n", [(2, EMPTY), (3, EMPTY), "x"]),
    "a row that is too long": ("a.csv", b"id,text\n1," + b"y" * 3000 + b"\n2,x\n", [(2, TOO_LONG), "x"]),
    "a quoted field of more than a record": ("a.csv", b'id,text\n1,"' + b"y\n" * 1010 + b'"\n2,x\n', [(2, TOO_LONG), "x"]),
    "one that passes the limit within a line": ("a.csv", b'id,text\n1,"' + b"y" * 99 + b"\n" + b"word word\n" * 500 + b'"\n2,x\n',
                                                [(2, TOO_LONG), "x"]),
    "an open quote of more than a record": ("a.csv", b'text\n"' + b"y\n" * 1010 + b"x\n", [(2, TOO_LONG)]),
    "only a header": ("a.csv", b"id,text\n", []),
    "nothing": ("a.csv", b"", []),
}  # fmt: skip


@pytest.mark.parametrize("what", CSV_CASES)
def test_csv_files(what: str, tmp_path: Path) -> None:
    name, content, expected = CSV_CASES[what]
    before = standard_csv.field_size_limit()
    assert outcome(read_bytes(tmp_path / name, content, max_record_bytes=2000)) == expected
    assert standard_csv.field_size_limit() == before


def test_a_field_of_a_megabyte_is_read(tmp_path: Path) -> None:
    [document] = read_bytes(tmp_path / "a.csv", b'text\n"' + b"word\n" * 200_000 + b'"\n')
    assert isinstance(document, Document)
    assert len(document.text) == 1_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,body\n1,a long text\n", "no column 'text' or 'content'; set text_key: body \\(columns: 'id', 'body'\\)"),
        (b"id;title;body\n12345;x;a long text\n", "set text_key: body"),
        ("id,text\n1,x\n".encode("utf-16"), "iconv -f UTF-16"),
        (b'"id,text\n1,x\n', "first row must name the columns.*never closed"),
    ],
)
def test_a_table_without_the_column_is_refused_with_the_likely_one(
    content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_bytes(tmp_path / "a.csv", content)


def test_parquet_without_the_column_names_the_likely_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": ["1"], "n": [10**9], "body": ["a long text"]}), path)
    with pytest.raises(DataError, match="set text_key: body"):
        list(parquet.read(path, SourceConfig(path=str(path))))


def test_a_record_without_the_field_names_the_likely_one_and_its_size(tmp_path: Path) -> None:
    line = b'{"id": "0123456789", "body": "a longer text", "n": 1}'
    [record] = read_bytes(tmp_path / "a.jsonl", line + b"\n")
    assert isinstance(record, Rejected)
    assert (record.other_field, record.num_bytes) == ("body", len(line) + 1)
    assert record.detail.endswith("set text_key: body")
    [chat] = read_bytes(tmp_path / "a.jsonl", b'{"id": "x", "messages": [{"role": "user", "content": "hi"}]}')
    assert isinstance(chat, Rejected)
    assert r"""jq -c '{text: ([.messages[] | "\(.role): \(.content)"] | join("\n\n"))}'""" in chat.detail
    [pair] = read_bytes(tmp_path / "a.jsonl", b'{"instruction": "say hi", "input": "", "output": "hi"}')
    assert "set text_key" not in pair.detail
    assert r'[.instruction, .input, .output] | map(select(. != null and . != "")) | join("\n\n")' in pair.detail
    [chat] = read_bytes(tmp_path / "a.jsonl", b'{"conversations": [{"from": "human", "value": "hi"}]}')
    assert isinstance(chat, Rejected)
    assert r"""[.conversations[] | "\(.from): \(.value)"]""" in chat.detail
    for name in ("a (a chat)", "b (an instruction)"):
        [plain] = read_bytes(tmp_path / "a.jsonl", b'{"%s": "a text"}' % name.encode())
        assert isinstance(plain, Rejected)
        assert plain.detail.endswith(f"set text_key: {name}")
    [nested] = read_bytes(tmp_path / "a.json", b'{"data":\n[{"text": "x"}]}')
    assert isinstance(nested, Rejected)
    assert "jq -c '.data[]'" in nested.detail


def test_a_line_of_dropped_records_has_counts_reasons_bytes_and_the_remedy() -> None:
    found = DroppedCount()
    for number in range(3):
        found.add(Rejected("a.jsonl", number, NO_FIELD, num_bytes=2048, other_field="body"))
    found.add(Rejected("a.jsonl", 9, TOO_LONG, num_bytes=70 * 2**20))
    ledger = {"records_read": 5, "documents_kept": 1, **found.to_ledger()}
    assert dropped_line("a.jsonl", ledger) == (
        "a.jsonl: 4 of 5 records were dropped: 3 no text field (6.0 KiB), 1 too long (70.0 MiB); "
        "set text_key: body (it is in 3 records)"
    )
    assert "text_key: body would read instead" in str(dropped_line("a", {**ledger, "documents_kept": 50}))
    assert dropped_line("a.jsonl", {"records_read": 5, "dropped": {}}) is None
