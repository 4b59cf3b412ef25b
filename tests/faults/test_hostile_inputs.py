"""Inputs that are damaged, absurd or meant to harm, through the real command: no traceback, no hang, bounded memory; the message
names the file, the line and what to do; and what was read is what was kept plus what was dropped, reason by reason."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest

from steep.cli.main import run
from steep.core.errors import DataError, ModelError
from steep.models.reference import base_reference
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig
from steep.store.prepare import prepare_sources
from steep.store.reader import open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import load_tokenizer

GOOD = b'{"text": "good"}\n'
HANG_SECONDS = 60  # by the clock, for a machine that is busy with other tests; the slowest takes 3 s on one that is not


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A test that takes longer than it may is stopped where it is."""

    def stop(*_: object) -> None:
        raise AssertionError(f"took more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_tokenizer_directory: Path) -> Path:
    return tiny_tokenizer_directory


class Outcome:
    """What the command said and made."""

    def __init__(self, code: int, output: str, errors: str, out: Path):
        self.code, self.output, self.errors, self.out = code, output, errors, out
        assert "Traceback" not in errors

    @property
    def ledger(self) -> dict[str, Any]:
        ledger: dict[str, Any] = json.loads((self.out / "manifest.json").read_text())["ledger"]
        return ledger

    @property
    def rejected(self) -> list[dict[str, Any]]:
        path = self.out / "rejected.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@pytest.fixture
def steep_prepare(tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def prepare_inputs(*arguments: str | Path, out: str = "out") -> Outcome:
        folder = tmp_path / out
        options = ["--tokenizer", str(tokenizer_folder), "--out", str(folder), "--workers", "1"]
        code = run(["prepare", *map(str, arguments), *options])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, folder)

    return prepare_inputs


# (what, bytes of a JSONL file that follow one good line and precede another, reasons of what is dropped, documents kept of it)
RECORDS: dict[str, tuple[bytes, dict[str, int], int]] = {
    "latin-1": (b'{"text": "caf\xe9"}', {"not UTF-8": 1}, 0),
    "UTF-16": ('{"text": "x"}'.encode("utf-16-le").replace(b"\n", b""), {"not JSON": 1}, 0),
    "an overlong encoding of a slash": (b'{"text": "\xc0\xaf"}', {"not UTF-8": 1}, 0),
    "a surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', {"not UTF-8": 1}, 0),
    "a code point beyond Unicode": (b'{"text": "\xf4\x90\x80\x80"}', {"not UTF-8": 1}, 0),
    "a character that is cut off": (b'{"text": "\xe4\xb8', {"not UTF-8": 1}, 0),
    "a lone high surrogate escape": (b'{"text": "\\ud800"}', {"not JSON": 1}, 0),
    "a lone low surrogate escape": (b'{"text": "a\\udc00b"}', {"not JSON": 1}, 0),
    "a pair of surrogate escapes": (b'{"text": "\\ud83d\\ude80"}', {}, 1),
    "NUL as an escape": (b'{"text": "a\\u0000b"}', {}, 1),
    "NUL as a byte": (b'{"text": "a\x00b"}', {"not JSON": 1}, 0),
    "a line of NUL": (b"\x00" * 4096, {"not JSON": 1}, 0),
    "a byte order mark in the middle": (b'\xef\xbb\xbf{"text": "x"}', {"not JSON": 1}, 0),
    "CRLF": (b'{"text": "x"}\r', {}, 1),
    "a lone CR between objects": (b'{"text": "x"}\r{"text": "y"}', {"not JSON": 1}, 0),
    "two objects on a line": (b'{"text": "x"} {"text": "y"}', {"not JSON": 1}, 0),
    "an object over two lines": (b'{"text":\n"x"}', {"not JSON": 2}, 0),
    "100,000 open brackets": (b"[" * 100_000, {"not JSON": 1}, 0),
    "JSON nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, {"not JSON": 1}, 0),
    "text in JSON nested 100,000 deep": (b'{"text": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001, {"not JSON": 1}, 0),
    "JSON nested 500 deep beside the text": (b'{"a": ' + b"[" * 500 + b"]" * 500 + b', "text": "x"}', {}, 1),
    "a number of 5,000 digits": (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', {}, 1),
    "a number of 5,000 digits as text": (b'{"text": ' + b"9" * 5000 + b"}", {"wrong type": 1}, 0),
    "an exponent of 10^9": (b'{"n": 1e1000000000, "text": "x"}', {}, 1),
    "NaN": (b'{"n": NaN, "text": "x"}', {}, 1),
    "Infinity deep in another field": (b'{"n": [{"a": -Infinity}], "text": "x"}', {}, 1),
    "half of a surrogate pair in another field": (b'{"title": "\\ud800", "text": "x"}', {}, 1),
    "NaN, and half of a surrogate pair in the text": (b'{"n": NaN, "text": "\\ud800"}', {"not JSON": 1}, 0),
    "NaN, and Latin-1 in the text": (b'{"n": NaN, "text": "caf\xe9"}', {"not UTF-8": 1}, 0),
    "Infinity as text": (b'{"text": -Infinity}', {"wrong type": 1}, 0),
    "single quotes": (b"{'text': 'x'}", {"not JSON": 1}, 0),
    "a trailing comma": (b'{"text": "x",}', {"not JSON": 1}, 0),
    "a comment": (b'// {"text": "x"}', {"not JSON": 1}, 0),
    "an array of objects": (b'[{"text": "x"}]', {"no text field": 1}, 0),
    "a bare string": (b'"text"', {"no text field": 1}, 0),
    "null": (b"null", {"no text field": 1}, 0),
    "no key": (b"{}", {"no text field": 1}, 0),
    "another case": (b'{"Text": "x"}', {"no text field": 1}, 0),
    "text is null": (b'{"text": null}', {"wrong type": 1}, 0),
    "text is a number": (b'{"text": 3}', {"wrong type": 1}, 0),
    "text is a list": (b'{"text": ["x"]}', {"wrong type": 1}, 0),
    "text is an object": (b'{"text": {"text": "x"}}', {"wrong type": 1}, 0),
    "text is true": (b'{"text": true}', {"wrong type": 1}, 0),
    "a duplicate key, the last counts": (b'{"text": 1, "text": "x"}', {}, 1),
    "a duplicate key, the last is wrong": (b'{"text": "x", "text": 1}', {"wrong type": 1}, 0),
    "10,000 other keys": (orjson.dumps({**{f"k{n}": n for n in range(10_000)}, "text": "x"}), {}, 1),
    "an empty text": (b'{"text": ""}', {"empty": 1}, 0),
    "white space of every kind": ('{"text": "\\t\\n \u00a0\u2003\u3000"}'.encode(), {"empty": 1}, 0),
    "blank lines": (b"\n  \n\t\r\n", {}, 0),
    "a literal special token": (b'{"text": "<|endoftext|>"}', {}, 1),
    "a megabyte of one letter": (b'{"text": "' + b"a" * 1_000_000 + b'"}', {}, 1),
    "right to left overrides": ('{"text": "\u202e\u202eabc\u2066"}'.encode(), {}, 1),
    "100,000 combining marks": (('{"text": "e' + "\u0301" * 100_000 + '"}').encode(), {}, 1),
    "a line of 5 MB without a limit that holds it": (b'{"text": "' + b"word " * 1_000_000 + b'"}', {"too long": 1}, 0),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDS)
def test_a_bad_record_is_one_line_of_the_ledger(
    what: str, steep_prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    content, dropped, kept = RECORDS[what]
    (tmp_path / "a.jsonl").write_bytes(GOOD + content + b"\n" + GOOD)
    outcome = steep_prepare(tmp_path / "a.jsonl", "--max-record-bytes", "2MB")
    assert outcome.code == 0, outcome.errors
    ledger = outcome.ledger
    assert ledger["dropped"] == dropped
    assert ledger["documents_kept"] == 2 + kept
    assert ledger["records_read"] == ledger["documents_kept"] + sum(dropped.values())
    assert Counter(record["reason"] for record in outcome.rejected) == dropped
    assert [record["line"] for record in outcome.rejected] == list(range(2, 2 + sum(dropped.values())))
    assert {record["file"] for record in outcome.rejected} <= {str(tmp_path / "a.jsonl")}
    for reason in dropped:
        assert reason in outcome.output
    if dropped:  # and told to stop, it stops there
        stopped = steep_prepare(
            tmp_path / "a.jsonl", "--max-record-bytes", "2MB", "--on-bad-record", "stop", out="stopped"
        )
        assert stopped.code == 1
        assert f"{tmp_path}/a.jsonl:2: {next(iter(dropped))}" in stopped.errors
        assert "on_bad_record" in stopped.errors
        assert not (stopped.out / "manifest.json").exists()


TEXTS: dict[str, tuple[bytes, list[str], dict[str, int], dict[int, str]]] = {
    "CRLF is kept": (b"a\r\nb\r\n", [], {}, {0: "a\r\nb\r\n"}),
    "a byte order mark is not": (b"\xef\xbb\xbfa", [], {}, {0: "a"}),
    "NUL is text": (b"a\x00b", [], {}, {0: "a\x00b"}),
    "only a separator": (b"<|x|>", ["--document-separator", "<|x|>"], {"empty": 1}, {}),
    "a separator cut off at the end": (b"one<|x|>two<|x", ["--document-separator", "<|x|>"], {}, {0: "one", 1: "two<|x"}),
    "a document that is too long": (
        b"one<|x|>" + b"long " * 1000 + b"<|x|>two", ["--document-separator", "<|x|>", "--max-record-bytes", "1kB"],
        {"too long": 1}, {0: "one", 1: "two"},
    ),
    "a paragraph that is too long": (
        b"one\n\n" + b"long\n" * 1000 + b"\ntwo", ["--document-separator", "blank_lines", "--max-record-bytes", "1kB"],
        {"too long": 1}, {0: "one\n", 1: "two"},
    ),
    "a line that is too long in a paragraph": (
        b"one\n\nx\n" + b"long" * 1000 + b"\ny\n\ntwo", ["--document-separator", "blank_lines", "--max-record-bytes", "1kB"],
        {"too long": 1}, {0: "one\n", 1: "two"},
    ),
    "one bad document of three": (
        b"one<|x|>\xff<|x|>two", ["--document-separator", "<|x|>"], {"not UTF-8": 1}, {0: "one", 1: "two"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_plain_text(what: str, steep_prepare: Callable[..., Outcome], tokenizer_folder: Path, tmp_path: Path) -> None:
    content, options, dropped, documents = TEXTS[what]
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"good")
    outcome = steep_prepare(tmp_path / "a.txt", tmp_path / "b.txt", *options)
    assert outcome.code == 0, outcome.errors
    assert outcome.ledger["dropped"] == dropped
    assert outcome.ledger["records_read"] == len(documents) + 1 + sum(dropped.values())
    store, tokenizer = open_store(outcome.out), load_tokenizer(TokenizerConfig(pretrained=str(tokenizer_folder)))
    texts = [tokenizer.decode(store.document(number)[:-1]) for number in range(store.num_documents)]
    assert texts == [*documents.values(), "good"]


def _gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _zst(content: bytes) -> bytes:
    compressed: bytes = pyarrow.compress(content, "zstd", asbytes=True)
    return compressed


def _parquet(path: Path, **columns: Any) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path.read_bytes()


def _noise(size: int) -> bytes:
    return b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(size // 32))


def many(count: int = 20_000) -> bytes:
    """JSONL of several blocks that does not compress to nothing."""
    return b"".join(b'{"text": "%s"}\n' % hashlib.sha256(b"%d" % n).hexdigest().encode() for n in range(count))


FILES: dict[str, tuple[str, Callable[[Path], bytes], list[str], str]] = {
    "a gzip file cut off": ("a.jsonl.gz", lambda p: _gz(many())[:-1000], [], "ended before"),
    "a gzip file without its checksum": ("a.jsonl.gz", lambda p: _gz(many())[:-8], [], "ended before"),
    "a gzip file with a wrong checksum": ("a.jsonl.gz", lambda p: _gz(GOOD)[:-8] + b"\0" * 8, [], "CRC check failed"),
    "a gzip file with a flipped byte": (
        "a.jsonl.gz", lambda p: (c := bytearray(_gz(many())), c.__setitem__(len(c) // 2, c[len(c) // 2] ^ 255))[0], [],
        "cannot be read",
    ),
    "garbage after gzip": ("a.jsonl.gz", lambda p: _gz(GOOD) + b"garbage", [], "Not a gzipped file"),
    "text named .gz": ("a.jsonl.gz", lambda p: GOOD, [], "Not a gzipped file"),
    "an empty .gz": ("a.jsonl.gz", lambda p: b"", [], "the input holds no documents"),
    "a Zstandard file cut off": ("a.jsonl.zst", lambda p: _zst(many())[:-1000], [], "cannot be read"),
    "text named .zst": ("a.jsonl.zst", lambda p: GOOD, [], "cannot be read"),
    "garbage after Zstandard": ("a.jsonl.zst", lambda p: _zst(GOOD) + b"garbage", [], "cannot be read"),
    "a gzip bomb in one line": ("a.jsonl.gz", lambda p: _gz(b"0" * 80_000_000), [], "a decompression bomb.*max_expansion"),
    "a gzip bomb of lines": ("a.jsonl.gz", lambda p: _gz(b"\n" * 80_000_000), [], "a decompression bomb.*max_expansion"),
    "a Zstandard bomb": ("a.jsonl.zst", lambda p: _zst(b"0" * 80_000_000), [], "a decompression bomb.*max_expansion"),
    "a bomb of text": ("a.txt.gz", lambda p: _gz(b"0" * 80_000_000), ["--max-record-bytes", "1GB"], "decompression bomb"),
    "more text than allowed": (
        "a.jsonl.gz", lambda p: _gz(many()), ["--max-expanded-bytes", "1MB"], "more than 1,000,000 bytes.*max_expanded_bytes",
    ),
    "an empty Parquet file": ("a.parquet", lambda p: b"", [], "not a complete Parquet file"),
    "text named .parquet": ("a.parquet", lambda p: GOOD * 10, [], "not a complete Parquet file"),
    "a Parquet file cut off": ("a.parquet", lambda p: _parquet(p, text=["x"] * 1000)[:-10], [], "not a complete Parquet file"),
    "a Parquet file with a damaged page": (
        "a.parquet", lambda p: (c := _parquet(p, text=[f"{n} text" for n in range(1000)]))[:4] + b"\xff" * 60 + c[64:], [],
        "Parquet|cannot be read",
    ),
    "Parquet without the column": ("a.parquet", lambda p: _parquet(p, body=["x"]), [], "no column 'text'.*'body'"),
    "Parquet with a number column": ("a.parquet", lambda p: _parquet(p, text=[1, 2]), [], "a.parquet:1: wrong type"),
    "Parquet with a list column": ("a.parquet", lambda p: _parquet(p, text=[["x"]]), [], "a.parquet:1: wrong type"),
    "Parquet without rows": (
        "a.parquet", lambda p: _parquet(p, text=pyarrow.array([], pyarrow.string())), [], "the input holds no documents",
    ),
    "Parquet of nulls": (
        "a.parquet", lambda p: _parquet(p, text=pyarrow.array([None, None], pyarrow.string())), [], "wrong type.*null",
    ),
    "an empty file": ("a.jsonl", lambda p: b"", [], "the input holds no documents: every file is empty"),
    "only line ends": ("a.jsonl", lambda p: b"\n\r\n\n", [], "the input holds no documents"),
    "a binary file": ("a.jsonl", lambda p: _noise(4096), [], "a.jsonl:1: not UTF-8"),
    "a file whose ending tells nothing": ("a.exe", lambda p: GOOD, [], "--input-format|format to one of"),
    "a .txt without a separator, longer than a record may be": (
        "a.txt", lambda p: b"x" * 3000, ["--max-record-bytes", "1kB"], "too long.*3,000 bytes.*document_separator",
    ),
    "a literal special token that is all there is": ("a.jsonl", lambda p: b'{"text": " "}', [], "a.jsonl:1: empty"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    what: str, steep_prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    name, content, options, message = FILES[what]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(content(path))
    outcome = steep_prepare(path, *options)
    assert outcome.code == 1
    said(outcome.errors, message)
    if "the input holds no documents" not in message:
        assert name in outcome.errors
    assert not (outcome.out / "manifest.json").exists()
    # nothing stands in the way of another try with a good file
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    assert steep_prepare(tmp_path / "good.jsonl", "--overwrite").code == 0


def said(errors: str, message: str) -> None:
    import re

    assert re.search(message, errors, re.DOTALL), errors


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        socket.socket(socket.AF_UNIX).bind(path.name if hasattr(contextlib, "chdir") else str(path))


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _broken(path: Path) -> None:
    path.symlink_to("nowhere")


SPECIAL = {"a FIFO": (_fifo, "named pipe"), "a socket": (_socket, "socket"), "a link to itself": (_loop, "a broken link"),
           "a broken link": (_broken, "a broken link")}  # fmt: skip


@pytest.mark.parametrize("given", ["file", "folder", "glob"])
@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_regular_file_is_named_and_never_opened(
    what: str, given: str, steep_prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    make, kind = SPECIAL[what]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.jsonl").write_bytes(GOOD)
    make(folder / "bad.jsonl")
    outcome = steep_prepare({"file": folder / "bad.jsonl", "folder": folder, "glob": folder / "*.jsonl"}[given])
    assert outcome.code == 1
    said(outcome.errors, f"bad.jsonl: is .*{kind}")
    assert not outcome.out.exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "a device"),
        ("/dev/null", "a device"),
        ("/proc/self/mem", "cannot be read"),
        ("no/such/file.jsonl", "no/such/file.jsonl' does not exist"),
        ("*.nothing", "matches no file"),
        ("-", "--input-format"),
        ("hub:", "hub:NAME"),
    ],
)
def test_paths_that_hold_no_text(path: str, message: str, steep_prepare: Callable[..., Outcome]) -> None:
    outcome = steep_prepare(path, *(["--input-format", "jsonl"] if path.startswith("/proc") else []))
    assert outcome.code == 1
    said(outcome.errors, message)


def test_a_name_that_is_not_utf8_is_refused(steep_prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(GOOD)
    outcome = steep_prepare(tmp_path / "in")
    assert outcome.code == 1
    said(outcome.errors, r"caf\\udce9\.jsonl.*not UTF-8. Rename it")


def test_a_loop_of_folders_ends(steep_prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "in" / "a" / "up").symlink_to("..")
    (tmp_path / "in" / "b").symlink_to("a")
    outcome = steep_prepare(tmp_path / "in")
    assert outcome.code == 0
    assert outcome.ledger["records_read"] == 1


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_streams_one_after_the_other_are_one_file(
    ending: str, steep_prepare: Callable[..., Outcome], tmp_path: Path
) -> None:
    compress = _gz if ending == ".gz" else _zst
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(GOOD + GOOD[:5]) + compress(GOOD[5:]) + compress(b"") + compress(GOOD))
    assert steep_prepare(path).ledger["documents_kept"] == 3


def test_what_compresses_well_is_no_bomb(steep_prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(_gz(GOOD * 200_000))
    outcome = steep_prepare(tmp_path / "a.jsonl.gz")
    assert outcome.ledger["documents_kept"] == 200_000
    assert outcome.ledger["exact_duplicates"]["documents"] == 199_999


@pytest.mark.parametrize("how", ["grows", "shrinks", "is replaced", "vanishes"])
def test_a_file_that_changes_while_it_is_read_is_named(how: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "a.jsonl", many(5000)
    path.write_bytes(content)
    tokenizer = load_tokenizer(TokenizerConfig(pretrained=str(tokenizer_folder)))

    def change(*_: object) -> None:
        if how == "grows":
            with path.open("ab") as file:
                file.write(GOOD)
        elif how == "shrinks":
            os.truncate(path, 100_000)
        elif how == "is replaced":
            (tmp_path / "new").write_bytes(content[::-1])
            os.replace(tmp_path / "new", path)
        else:
            path.unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"a\.jsonl: (changed while it was being read|cannot be read)"):
        prepare_sources([SourceConfig(path=str(path))], tokenizer, tmp_path / "out", PrepareConfig(workers=1), change)
    path.write_bytes(content)
    result = prepare_sources(
        [SourceConfig(path=str(path))], tokenizer, tmp_path / "out", PrepareConfig(workers=1), overwrite=True
    )
    assert result.documents == 5000


def test_another_tokenizer_than_before_is_refused_by_name(
    steep_prepare: Callable[..., Outcome], tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert steep_prepare(tmp_path / "a.jsonl").code == 0
    outcome = steep_prepare(tmp_path / "a.jsonl", "--no-append-eos")
    assert outcome.code == 1
    said(outcome.errors, "already holds a token store.*tokenizer: .* there, .* now.*--overwrite")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: os.truncate(out / "shard_00000.bin", 2), r"shard_00000\.bin.*bytes"),
        (lambda out: os.truncate(out / "shard_00000.idx", 50), r"shard_00000\.idx"),
        (lambda out: (out / "shard_00000.bin").unlink(), r"shard_00000\.bin"),
        (lambda out: (out / "manifest.json").write_text("{"), r"manifest\.json"),
        (lambda out: (out / "manifest.json").write_text("[" * 5000), r"manifest\.json"),
        (lambda out: (out / "manifest.json").unlink(), r"documents\.npy|manifest"),
    ],
)
def test_a_damaged_store_is_named(
    damage: Callable[[Path], object], message: str, steep_prepare: Callable[..., Outcome], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(GOOD * 9)
    out = steep_prepare(tmp_path / "a.jsonl").out
    damage(out)
    with pytest.raises(DataError, match=message):
        open_store(out)
    assert run(["inspect", str(out)]) in (1, 2)
    said(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc/nothing/here", "/proc/nothing/here"),
        ("/dev/null", "/dev/null: is a file"),
        ("a.jsonl/out", "a.jsonl/out"),
    ],
)
def test_a_place_that_cannot_hold_a_store_is_named(
    out: str, message: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    place = str(tmp_path / out)
    code = run(["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_folder), "--out", place])
    assert code == 1
    said(capsys.readouterr().err, message)


def test_options_that_cannot_be_are_named(steep_prepare: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    cases = [("--max-tokens", "many"), ("--max-tokens", "0"), ("--dedup", "fuzzy"), ("--format", "jsonl"),
             ("--max-tokens", "-5"), ("--max-record-bytes", "5 parsecs"), ("--shard-tokens", "1.5")]  # fmt: skip
    for option, value in cases:
        outcome = steep_prepare(tmp_path / "a.jsonl", f"{option}={value}")
        assert outcome.code == 2, (option, value)
        said(
            outcome.errors,
            option.removeprefix("--").replace("-", "_") if option != "--format" else "--input-format jsonl",
        )
        assert not outcome.out.exists()


LIMITED = """
import json, resource, sys
from pathlib import Path
from steep.core.errors import SteepError
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig
from steep.store.prepare import prepare_sources
from steep.tokenizer.encode import TextTokenizer

source, tokenizer, folder, changes = sys.argv[1:]
tokenizer, config = TextTokenizer.load(Path(tokenizer)), PrepareConfig(workers=1, **json.loads(changes))
failed = 0
for number, limit in enumerate([0, 1, 10, 100, 300, 1000, 3000, 5000, 10000, 20000, 40000, 10**9]):
    out = Path(folder) / str(number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        prepare_sources([SourceConfig(path=source)], tokenizer, out, config)
        assert (out / "manifest.json").is_file()
    except SteepError as error:
        failed += 1
        assert "larger than this system allows" in str(error) and str(out) in str(error), error
        assert not (out / "manifest.json").exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    prepare_sources([SourceConfig(path=source)], tokenizer, out, config)
print(failed)
"""


@pytest.mark.parametrize(
    "changes", [{}, {"dedup": "exact", "shard_tokens": 1000}, {"format": "nanogpt"}], ids=["plain", "choice", "export"]
)
def test_a_disk_that_is_full_at_any_stage_is_said_and_continued(
    changes: dict[str, Any], tokenizer_folder: Path, tmp_path: Path, documents: list[str]
) -> None:
    """Every file that is written, from the lock to the manifest, is too large at one of the limits."""
    load_tokenizer(TokenizerConfig(pretrained=str(tokenizer_folder))).save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("\n".join([*(json.dumps({"text": text}) for text in documents[:9]), "{"]))
    program = LIMITED
    if changes.pop("format", None):
        program = LIMITED.replace("import prepare\n", "import prepare as plain, write_export\n", 1).replace(
            "failed = 0", "prepare = lambda *arguments: write_export(plain(*arguments), 'nanogpt', None)\nfailed = 0"
        )
    arguments = [str(tmp_path / "a.jsonl"), str(tmp_path / "tokenizer"), str(tmp_path / "out"), json.dumps(changes)]
    finished = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=90)
    assert finished.returncode == 0, finished.stderr
    assert 6 <= int(finished.stdout) <= 11
    stores = [folder_hashes(tmp_path / "out" / str(number)) for number in range(12)]
    assert all(store == stores[0] for store in stores)


def folder_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_eight_processes_at_once_leave_one_good_store(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Those that come while it is being prepared are refused with its process; those that come later find it."""
    load_tokenizer(TokenizerConfig(pretrained=str(tokenizer_folder))).save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_bytes(many(4000))
    program = (
        "import sys; from pathlib import Path; from steep.store.prepare import prepare_sources\n"
        "from steep.sources.config import SourceConfig; from steep.store.config import PrepareConfig\n"
        "from steep.tokenizer.encode import TextTokenizer; from steep.core.errors import DataError\n"
        "source, tokenizer, out = sys.argv[1:]; sources = [SourceConfig(path=source)]\n"
        "tokenizer = TextTokenizer.load(Path(tokenizer)); config = PrepareConfig(workers=1, dedup='exact')\n"
        "try: print(prepare_sources(sources, tokenizer, Path(out), config))\n"
        "except DataError as error: sys.exit(str(error))\n"
    )
    arguments = [str(tmp_path / "a.jsonl"), str(tmp_path / "tokenizer")]
    command = [sys.executable, "-c", program, *arguments, str(tmp_path / "out")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    ends = [process.communicate(timeout=60) for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes
    for code, (output, errors) in zip(codes, ends, strict=True):
        said(
            output if code == 0 else errors,
            "prepared in|already there" if code == 0 else r"process \d+ is preparing it",
        )
        assert "Traceback" not in errors
    assert sum("prepared in" in output for output, _ in ends) == 1
    subprocess.run([*command[:-1], str(tmp_path / "alone")], check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "alone")


def run_measured(source: Path, tokenizer_folder: Path, out: Path, *options: str) -> tuple[str, int]:
    """The command in a process of its own: its output and its largest resident set in bytes."""
    program = "import resource, sys; from steep.cli.main import run; code = run(sys.argv[1:])\n" \
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)"  # fmt: skip
    options = ("--tokenizer", str(tokenizer_folder), "--out", str(out), "--workers", "1", *options)
    finished = subprocess.run(
        [sys.executable, "-c", program, "prepare", str(source), *options], capture_output=True, text=True, timeout=90
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, int(finished.stdout.split("peak ")[1])


@pytest.mark.slow
def test_a_line_of_200_mb_takes_no_memory_to_speak_of(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small.jsonl").write_bytes(GOOD)
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(200):
            file.write(b"word " * 200_000)
        file.write(b'"}\n' + GOOD)
    _, small = run_measured(tmp_path / "small.jsonl", tokenizer_folder, tmp_path / "small")
    output, large = run_measured(tmp_path / "large.jsonl", tokenizer_folder, tmp_path / "large")
    assert "2 documents" in output
    assert "1 too long" in output
    assert large - small < 200 * 2**20  # the limit itself is 64 MiB


def test_standard_input_is_read_and_continued(tokenizer_folder: Path, tmp_path: Path) -> None:
    load_tokenizer(TokenizerConfig(pretrained=str(tokenizer_folder))).save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_bytes(many(3000) + b"{\n")
    program = (
        "import sys; from pathlib import Path; from steep.store.prepare import prepare_sources\n"
        "from steep.sources.config import SourceConfig; from steep.store.config import PrepareConfig\n"
        "from steep.tokenizer.encode import TextTokenizer\n"
        "source, tokenizer, out = sys.argv[1:]; sources = [SourceConfig(path=source, format='jsonl')]\n"
        "print(prepare_sources(sources, TextTokenizer.load(Path(tokenizer)), Path(out), PrepareConfig(workers=1)))\n"
    )
    for number in range(2):
        with (tmp_path / "a.jsonl").open("rb") as standard_input:
            finished = subprocess.run(
                [sys.executable, "-c", program, "-", str(tmp_path / "tokenizer"), str(tmp_path / "out")],
                stdin=standard_input, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        assert ("already there" in finished.stdout) == (number == 1)
    tokenizer = load_tokenizer(TokenizerConfig(pretrained=str(tokenizer_folder)))
    from_file = prepare_sources(
        [SourceConfig(path=str(tmp_path / "a.jsonl"))], tokenizer, tmp_path / "file", PrepareConfig(workers=1)
    )
    store = open_store(tmp_path / "out")
    assert store.fingerprint == open_store(from_file.path).fingerprint
    assert store.manifest["sources"][0]["path"] == "-"
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert (rejected["file"], rejected["line"]) == ("standard input", 3001)
    assert list((tmp_path / "out").rglob(".*")) == []


def test_the_table_is_as_long_as_promised() -> None:
    assert len(RECORDS) + len(TEXTS) + len(FILES) + len(SPECIAL) >= 60
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_adapters_that_are_the_base_of_each_other_are_refused(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a"), ("alone", "alone")):
        (tmp_path / one).mkdir()
        settings = {"base_model_name_or_path": str(tmp_path / other), "peft_type": "LORA"}
        (tmp_path / one / "adapter_config.json").write_text(json.dumps(settings))
        (tmp_path / one / "adapter_model.safetensors").write_bytes(b"")
    for name in ("a", "alone"):
        with pytest.raises(ModelError, match="leads back to itself"):
            base_reference(tmp_path / name)
