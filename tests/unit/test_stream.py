"""Text that is tokenized while it is trained on: the same sequences at any resume, every token once, every record counted."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steep.config.load import load_run_config
from steep.core.errors import ConfigError, DataError
from steep.order.config import TrainSourceConfig
from steep.sources.dropped import MOST_FIELDS
from steep.store import stream
from steep.store.stream import StreamSource
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.open import text_tokenizer
from steep.training.loop import train
from support import losses, run_mapping


@pytest.fixture
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return text_tokenizer(load_hf_tokenizer(str(tiny_tokenizer_directory)), TokenizerConfig())


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    """Seven files: JSON lines with bad ones among them, plain and gzip."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(7):
        texts = documents[number::7]
        lines = [json.dumps({"text": text}) for text in texts]
        lines.insert(number % 3, "not json")
        content = ("\n".join(lines) + "\n").encode()
        name = f"{number}.jsonl" if number % 2 else f"{number}.jsonl.gz"
        (folder / name).write_bytes(content if number % 2 else gzip.compress(content))
    return folder


def sequences(source: StreamSource, first: int, count: int) -> list[list[list[int]]]:
    """The ids of each piece of these sequences."""
    found = []
    for number in range(first, first + count):
        pieces = []
        for token_range in source.ranges(number):
            ids = np.empty(token_range.count, dtype=np.int64)
            source.read(token_range.document, token_range.start, token_range.count, ids)
            pieces.append(ids.tolist())
        found.append(pieces)
    return found


def opened(corpus: Path, tokenizer: TextTokenizer, length: int = 32, seed: int = 3) -> StreamSource:
    return StreamSource(TrainSourceConfig(path=str(corpus), stream=True), tokenizer, length, seed)


def test_each_reader_gives_every_token_of_its_files_once_and_in_order(
    corpus: Path, tokenizer: TextTokenizer, documents: list[str]
) -> None:
    source = opened(corpus, tokenizer)
    assert source.num_readers == 7
    rows = sequences(source, 0, 7 * 40)
    assert all(sum(map(len, row)) == 32 for row in rows)
    files = [
        [ids for text in documents[n::7] for ids in tokenizer.encode_documents([text])[0].tolist()] for n in range(7)
    ]
    for reader in range(7):
        tokens = [token for row in rows[reader::7] for piece in row for token in piece]
        assert any(tokens == (file * (len(tokens) // len(file) + 2))[: len(tokens)] for file in files) or any(
            tokens[: len(file)] == file[: len(tokens)] for file in files
        )


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 50, 333])
def test_a_stream_continues_from_its_cursors(corpus: Path, tokenizer: TextTokenizer, taken: int) -> None:
    straight = sequences(opened(corpus, tokenizer), 0, taken + 60)
    first = opened(corpus, tokenizer)
    sequences(first, 0, taken + 9)  # a loader reads ahead
    cursors = json.loads(json.dumps(first.cursors(taken)))
    again = opened(corpus, tokenizer)
    again.begin_at(cursors, taken)
    assert sequences(again, taken, 60) == straight[taken:]
    assert again.ledger(taken + 60) == first.ledger(taken + 60)


def test_labels_follow_into_the_next_sequence(corpus: Path, tokenizer: TextTokenizer) -> None:
    source = opened(corpus, tokenizer)
    for number in range(40):
        last = source.ranges(number)[-1]
        following = source.ranges(number + source.num_readers)[0]
        if source.document_lengths[last.document] > last.start + last.count:
            both, one = np.empty(1, dtype=np.int64), np.empty(1, dtype=np.int64)
            source.read(last.document, last.start + last.count, 1, both)
            source.read(following.document, following.start, 1, one)
            assert both == one
            assert following.start == last.start + last.count


def test_every_record_is_counted(corpus: Path, tokenizer: TextTokenizer, documents: list[str]) -> None:
    source = opened(corpus, tokenizer)
    tokens = sum(len(ids) for ids in tokenizer.encode_documents(documents))
    ledger = source.ledger(int(0.9 * tokens / 32))
    assert ledger["records_read"] == ledger["documents_kept"] + sum(ledger["dropped"].values())
    assert 0 < ledger["dropped"]["not JSON"] <= 14


def test_a_stream_with_a_new_field_in_every_record_remembers_only_the_first(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    path = tmp_path / "odd.jsonl"
    rows = ({f"field {number}": "a text", **({"text": "kept"} if number % 2 else {})} for number in range(600))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = opened(path, tokenizer)
    sequences(source, 0, 40)
    cursors = source.cursors(40)
    assert sum(sum(cursor["dropped"].values()) for cursor in cursors) > MOST_FIELDS
    assert all(len(cursor["other_fields"]) <= MOST_FIELDS for cursor in cursors)
    assert len(source.ledger(40)["other_fields"]) == MOST_FIELDS


def test_large_files_are_cut_and_the_seed_and_epoch_order_the_parts(
    tmp_path: Path, tokenizer: TextTokenizer, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PART_BYTES", 4096)  # instead of a file of hundreds of megabytes
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    source = opened(path, tokenizer)
    assert source.num_readers > 3
    assert sequences(source, 0, 20) != sequences(opened(path, tokenizer, seed=4), 0, 20)
    assert sequences(source, 0, 20) == sequences(opened(path, tokenizer), 0, 20)


def test_what_has_gone_by_and_what_is_empty_is_said(tmp_path: Path, corpus: Path, tokenizer: TextTokenizer) -> None:
    source = opened(corpus, tokenizer)
    source.begin_at(source.cursors(20), 20)
    with pytest.raises(DataError, match="sequence 3 of a stream was asked for after it had passed"):
        source.ranges(3)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no document"):
        opened(tmp_path / "empty.jsonl", tokenizer).ranges(0)


def test_a_file_rewritten_to_the_same_size_is_noticed_at_the_cursor(
    tmp_path: Path, tokenizer: TextTokenizer, documents: list[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:5]))
    cursors = opened(path, tokenizer).cursors(2)
    assert cursors[0]["tokens"] > 0
    assert cursors[0]["checksum"] > 0
    path.write_text(path.read_text().replace("the", "eht"))
    changed = opened(path, tokenizer)
    changed.begin_at(cursors, 2)
    with pytest.raises(DataError, match=r"text\.jsonl: record 1 is not the one .* file has changed"):
        changed.ranges(2)


def test_settings_that_make_other_documents_make_another_stream(corpus: Path, tokenizer: TextTokenizer) -> None:
    plain = opened(corpus, tokenizer).fingerprint
    for setting in ({"text_key": "content"}, {"max_record_bytes": 1000}):
        source = TrainSourceConfig(path=str(corpus), stream=True, **setting)
        assert StreamSource(source, tokenizer, 32, 3).fingerprint != plain
    renamed = TrainSourceConfig(path=str(corpus), stream=True, name="other", weight=2)
    assert StreamSource(renamed, tokenizer, 32, 3).fingerprint == plain


@pytest.fixture
def mapping(tmp_path: Path, corpus: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    source = {"path": str(corpus), "stream": True}
    held_out = {"heldout": {"path": str(corpus / "1.jsonl")}}
    return run_mapping(tmp_path, corpus, tiny_tokenizer_directory, data={"train": [source], "validation": held_out})


def run(mapping: dict[str, Any], name: str, *overrides: str) -> list[tuple[int, float, float]]:
    config = load_run_config(mapping=mapping, overrides=["--run.name", name, *overrides])
    train(config, stream=io.StringIO())
    return losses(Path(mapping["run"]["directory"]) / name)


def test_a_run_that_streams_resumes_bit_for_bit(mapping: dict[str, Any], tmp_path: Path) -> None:
    straight = run(mapping, "straight", "--schedule.name", "constant", "--train.steps", "6")
    run(mapping, "stopped", "--schedule.name", "constant", "--train.steps", "3")
    assert run(mapping, "stopped", "--schedule.name", "constant", "--train.steps", "6") == straight
    assert run(mapping, "small", "--schedule.name", "constant", "--train.micro_batch_size", "4") == straight
    ledger = json.loads((tmp_path / "runs" / "stopped" / "ledger.json").read_text())["sources"][0]
    assert ledger["tokens_trained"] == 6 * 4 * 64
    assert ledger["records_read"] == ledger["documents_kept"] + sum(ledger["dropped"].values())


def test_a_global_batch_of_many_sequences_can_be_streamed_and_saved(mapping: dict[str, Any], tmp_path: Path) -> None:
    mapping["data"] = {**mapping["data"], "sequence_length": 4, "validation": {}}
    mapping["checkpoint"] = {"every_steps": 1}
    sizes = ["--train.global_batch_size", "8192", "--train.micro_batch_size", "8192", "--train.steps", "4"]
    assert len(run(mapping, "large", *sizes)) == 4


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("train", {"steps": None}, "needs its length in train.tokens or train.steps"),
        ("data", {"validation": {"x": {"share": 0.1}}}, "name held-out files by path"),
        ("data", {"align_to_bos": True}, "align_to_bos needs prepared text"),
        ("data", {"prepare": {"min_tokens": 100}}, "prepare.min_tokens applies to prepared text only"),
        ("data", {"prepare": {"on_bad_record": "stop"}}, "prepare.on_bad_record applies to prepared text only"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_at_once(
    mapping: dict[str, Any], section: str, changes: dict[str, Any], named: str
) -> None:
    mapping[section] = {**mapping[section], **changes}
    with pytest.raises(ConfigError, match=named):
        load_run_config(mapping=mapping)
