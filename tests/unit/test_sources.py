"""Finding files, and each format's own edges: what is a document, what is rejected and why."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steep.core.errors import ConfigError, DataError
from steep.sources.config import SourceConfig
from steep.sources.document import (
    EMPTY,
    NO_FIELD,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    WRONG_TYPE,
    Document,
    Rejected,
)
from steep.sources.formats import jsonl, parquet, plain_text
from steep.sources.hints import say_hints
from steep.sources.inputs import expand_inputs, load_format


def read_jsonl(path: Path, content: bytes, text_key: str | None = None) -> list[Document | Rejected]:
    path.write_bytes(content)
    return list(jsonl.read(path, SourceConfig(path=str(path), text_key=text_key)))


def read_text(path: Path, content: bytes, separator: str | None = None) -> list[Document | Rejected]:
    path.write_bytes(content)
    return list(plain_text.read(path, SourceConfig(path=str(path), document_separator=separator)))


def outcome(records: list[Document | Rejected]) -> list[str | tuple[int, str]]:
    return [record.text if isinstance(record, Document) else (record.line, record.reason) for record in records]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', NOT_UTF8),
        (b"{bad", NOT_JSON),
        (b'{"text": NaN}', WRONG_TYPE),
        (b'{"text": "\\ud800"}', NOT_JSON),
        (b"[1, 2]", NO_FIELD),
        (b'"text"', NO_FIELD),
        (b"null", NO_FIELD),
        (b'{"body": "x"}', NO_FIELD),
        (b'{"text": null}', WRONG_TYPE),
        (b'{"text": ["x"]}', WRONG_TYPE),
        (b'{"text": 3}', WRONG_TYPE),
        (b'{"text": ""}', EMPTY),
        (b'{"text": " \\n\\t"}', EMPTY),
    ],
)
def test_jsonl_rejects_with_reason_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    records = read_jsonl(tmp_path / "a.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}')
    assert outcome(records) == ["one", (3, reason), "two"]
    assert str(records[1]).startswith(f"{tmp_path}/a.jsonl:3: {reason}")


def test_jsonl_takes_text_else_content_else_the_named_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert outcome(read_jsonl(path, b'{"content": "c", "text": "t"}\n{"content": "c"}')) == ["t", "c"]
    assert outcome(read_jsonl(path, b'{"content": "c", "text": "t", "body": "b"}', "body")) == ["b"]
    (rejected,) = read_jsonl(path, b'{"content": "c"}', "body")
    assert isinstance(rejected, Rejected)
    assert "'body'" in rejected.detail
    assert "'content'" in rejected.detail


def test_jsonl_removes_the_byte_order_mark_and_keeps_crlf_out_of_the_text(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n{"text": "two"}\r\n'
    assert outcome(read_jsonl(tmp_path / "a.jsonl", content)) == ["one\r\n", "two"]


def test_plain_text_is_one_document_exactly_as_it_stands(tmp_path: Path) -> None:
    (record,) = read_text(tmp_path / "a.txt", b"\xef\xbb\xbf one\r\n\r\ntwo \n")
    assert isinstance(record, Document)
    assert record.text == " one\r\n\r\ntwo \n"
    assert record.id == str(tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \n"])
def test_an_empty_text_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    assert outcome(read_text(tmp_path / "a.txt", content)) == [(1, EMPTY)]


def test_utf16_is_rejected_with_what_to_do(tmp_path: Path) -> None:
    (record,) = read_text(tmp_path / "a.txt", "text".encode("utf-16"))
    assert isinstance(record, Rejected)
    assert record.reason == NOT_UTF8
    assert "iconv" in record.detail


def test_separator_splits_keeps_everything_else_and_counts_lines(tmp_path: Path) -> None:
    content = b"one\n<|s|>two\nlines<|s|><|s|>\xff\n<|s|>last<|s|>\n"
    assert outcome(read_text(tmp_path / "a.txt", content, "<|s|>")) == [
        "one\n",
        "two\nlines",
        (3, EMPTY),
        (3, NOT_UTF8),
        "last",
    ]


def test_blank_lines_split_paragraphs(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf\n\none\ntwo\n \t\n\nthree\r\n\r\nfour"
    records = read_text(tmp_path / "a.txt", content, "blank_lines")
    assert outcome(records) == ["one\ntwo\n", "three\r\n", "four"]
    assert [record.id.rpartition(":")[2] for record in records if isinstance(record, Document)] == ["3", "7", "9"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab=\n", max_size=6), max_size=6), st.integers(1, 9), st.sampled_from(["=", "==", "=\n="]))
def test_separator_splitting_equals_str_split_for_any_block_size(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], block: int, separator: str
) -> None:
    path = tmp_path_factory.mktemp("split") / "a.txt"
    text = separator.join(pieces)
    path.write_text(text, encoding="utf-8", newline="")
    expected = text.split(separator)
    if not expected[-1].strip():
        expected.pop()  # white space after the last separator is no record
    with path.open("rb") as stream:
        pieces_found = list(plain_text._pieces(SmallBlocks(stream, block), separator.encode()))  # type: ignore[arg-type]
    assert [piece.decode() for piece, _, _ in pieces_found] == expected
    raw, lines = text.encode(), [1 + text[:at].count("\n") for _, _, at in pieces_found]
    assert all(raw[at:].startswith(piece) for piece, _, at in pieces_found)
    assert [line for _, line, _ in pieces_found] == lines


class SmallBlocks:
    """A stream that gives at most `size` bytes at a time, so that separators straddle blocks."""

    def __init__(self, stream, size: int):
        self.stream, self.size = stream, size

    def read(self, count: int) -> bytes:
        return self.stream.read(min(count, self.size) if count > 3 else count)


def test_parquet_rejects_by_row_and_reads_bytes_that_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = pyarrow.array([b"one", b"\xff", None, b"", "ü".encode()], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"content": values}), path)
    expected = ["one", (2, NOT_UTF8), (3, WRONG_TYPE), (4, EMPTY), "ü"]
    assert outcome(list(parquet.read(path, SourceConfig(path="x")))) == expected


def test_parquet_string_column_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"one", b"\xff"], pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), path)
    assert outcome(list(parquet.read(path, SourceConfig(path="x")))) == ["one", (2, NOT_UTF8)]


def test_parquet_names_the_columns_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(DataError, match="'body', 'n'"):
        list(parquet.read(path, SourceConfig(path="x")))
    assert outcome(list(parquet.read(path, SourceConfig(path="x", text_key="n")))) == [(1, WRONG_TYPE)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/z.txt", "a/c.jsonl.gz", ".hidden.txt", ".git/x.txt", "a-b.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    return tmp_path


def names(folder: Path, *paths: str, **options: str) -> list[str]:
    config = SourceConfig(path=[str(folder / path) for path in paths], **options)
    return [str(file.path.relative_to(folder)) for file in expand_inputs(config)]


def test_folders_are_recursive_sorted_and_without_hidden_files(tree: Path) -> None:
    assert names(tree, ".") == ["a/c.jsonl.gz", "a/z.txt", "a-b.txt", "b.txt"]
    assert names(tree, "*.txt") == ["a-b.txt", "b.txt"]
    assert names(tree, "**/*.txt") == ["a/z.txt", "a-b.txt", "b.txt"]
    assert names(tree, "b.txt", ".") == ["b.txt", "a/c.jsonl.gz", "a/z.txt", "a-b.txt"]


def test_format_follows_the_ending_unless_it_is_given(tree: Path) -> None:
    formats = {file.path.name: file.format for file in expand_inputs(SourceConfig(path=str(tree)))}
    assert formats == {"b.txt": "plain_text", "z.txt": "plain_text", "c.jsonl.gz": "jsonl", "a-b.txt": "plain_text"}
    (tree / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"\.pdf, for example .*a\.pdf(?s:.*)pdftotext(?s:.*)\.jsonl(?s:.*)plain_text"):
        expand_inputs(SourceConfig(path=str(tree)))
    assert names(tree, "a.pdf", format="plain_text") == ["a.pdf"]


def test_a_folder_of_code_leaves_out_what_is_not_its_own_text_and_names_it(tmp_path: Path) -> None:
    for name in ("main.py", "lib/a.rs", "lib/b.js", "README.md", "node_modules/x/index.js", "lib/jquery.min.js", "logo.png",
                 "package.json", "LICENSE", "guide.pdf", ".git/HEAD"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"this is {name}")
    config = SourceConfig(path=str(tmp_path))
    found = {str(file.path.relative_to(tmp_path)): file.format for file in expand_inputs(config)}
    assert found == {"main.py": "code", "lib/a.rs": "code", "lib/b.js": "code", "README.md": "plain_text"}
    lines: list[str] = []
    say_hints(config, lines.append)
    [line] = lines
    assert line.startswith(f"{tmp_path}: code, one document per file: ")
    for part in (
        "1 .py",
        "1 .rs",
        "1 .js",
        "1 .md",
        "1 node_modules/",
        "1 .min.js",
        "1 .png",
        "1 .json",
        "1 no ending",
    ):
        assert part in line
    assert "for the text of .pdf: pdftotext" in line


def test_one_script_beside_data_makes_no_folder_of_code(tree: Path) -> None:
    (tree / "make_data.py").write_text("x")
    (tree / "model.bin").write_text("x")
    with pytest.raises(DataError, match=r"1 file of no known format: \.bin"):
        expand_inputs(SourceConfig(path=str(tree)))
    (tree / "model.bin").unlink()
    lines: list[str] = []
    say_hints(SourceConfig(path=str(tree)), lines.append)
    assert lines == [f"{tree}/make_data.py: source code, read as text"]


def test_a_loop_of_links_ends_and_linked_files_are_taken_once(tree: Path) -> None:
    (tree / "a" / "up").symlink_to(tree, target_is_directory=True)
    (tree / "copy.txt").symlink_to(tree / "b.txt")
    found = names(tree, ".")
    assert len(found) == 4
    assert {os.path.basename(name) for name in found} >= {"z.txt", "c.jsonl.gz", "a-b.txt"}


def test_a_link_to_itself_is_named(tree: Path) -> None:
    (tree / "self.txt").symlink_to(tree / "self.txt")
    with pytest.raises(DataError, match=r"self\.txt"):
        expand_inputs(SourceConfig(path=str(tree / "self.txt")))
    with pytest.raises(DataError, match=r"self\.txt: cannot be read"):
        list(plain_text.read(tree / "self.txt", SourceConfig(path="x")))


@pytest.mark.parametrize(
    ("path", "message"), [("none.txt", "no such file"), ("*.none", "matches no file"), ("empty", "no files")]
)
def test_nothing_there_is_an_error_that_says_so(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        expand_inputs(SourceConfig(path=str(tmp_path / path)))


def test_an_unknown_format_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'parquet'"):
        load_format("parqet")


@settings(max_examples=150, deadline=None)
@example(pieces=["\ufeff \n<"], separator="blank_lines", part_bytes=1, limit_bytes=3, begin=b"")
@example(pieces=["     \n<"], separator="blank_lines", part_bytes=1, limit_bytes=3, begin=b"")
@given(
    pieces=st.lists(st.text("ab<> \n\r\ufeff", max_size=8), max_size=10),
    separator=st.sampled_from(["<>", "\n", "<a>", "blank_lines"]),
    part_bytes=st.integers(1, 12),
    limit_bytes=st.sampled_from([3, 1000]),
    begin=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_parts_of_a_text_file_joined_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], separator: str, part_bytes: int, limit_bytes: int,
    begin: bytes,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_bytes(begin + ("\n\n" if separator == "blank_lines" else separator).join(pieces).encode())
    config = SourceConfig(path=str(path), document_separator=separator, max_record_bytes=limit_bytes)
    whole = [places(record) for record in plain_text.read(path, config)]
    spans = plain_text.split(path, part_bytes, config)
    parts = [places(record) for span in spans for record in plain_text.read(path, config, span)]
    assert parts == whole


def places(record: Document | Rejected) -> tuple[int, str]:
    return (record.line, record.text if isinstance(record, Document) else f"{record.reason}: {record.detail}")


@pytest.mark.parametrize(("separator", "parts"), [(None, 0), ("\n===\n", 0), ("aa", 0), ("<|endoftext|>", 4)])
def test_a_text_file_is_cut_only_where_documents_can_be_found(
    tmp_path: Path, separator: str | None, parts: int
) -> None:
    (tmp_path / "a.txt").write_text("x" * 400)
    config = SourceConfig(path="x", document_separator=separator)
    assert len(plain_text.split(tmp_path / "a.txt", 100, config)) == parts
    assert plain_text.split(tmp_path / "a.txt.gz", 100, config) == []


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_long_line_is_passed_over_in_bounded_memory_and_counted(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    content = b'{"text": "one"}\n{"text": "' + b"x" * 20_000_000 + b'"}\n{"text": "two"}\n' + b"y" * 2000
    path.write_bytes(gzip.compress(content) if ending else content)
    config = SourceConfig(path=str(path), max_record_bytes=1000, max_expansion=10**6)
    tracemalloc.start()
    records = list(jsonl.read(path, config))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome(records) == ["one", (2, TOO_LONG), "two", (4, TOO_LONG)]
    assert "20,000,013 bytes; max_record_bytes is 1,000" in str(records[1])
    assert peak_bytes < 8_000_000


def test_a_record_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    line = b'{"text": "one"}'
    path = tmp_path / "a.jsonl"
    for limit_bytes, kept in ((15, True), (14, False)):
        path.write_bytes(line)
        (record,) = jsonl.read(path, SourceConfig(path="x", max_record_bytes=limit_bytes))
        assert isinstance(record, Document) == kept
