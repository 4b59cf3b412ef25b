"""One run per directory: a second process, another configuration, changed data and a finished run are each told apart."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from processes import Steep, final_weights, same_records
from steep.config.load import load_run_config
from steep.core.errors import CheckpointError, ConfigError, SteepError
from steep.core.say import say_nothing
from steep.data.open import open_run_data
from steep.inspection import inspect
from steep.store.cut_store import CutStore
from steep.tokenizer.open import load_tokenizer
from steep.training.loop import train
from steep.training.result import TrainResult
from support import losses, run_mapping, write_yaml


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    """A corpus that a test may change."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number, text in enumerate(documents[:30]):
        (directory / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture
def mapping(tmp_path: Path, corpus: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    return run_mapping(tmp_path, corpus, tiny_tokenizer_directory, train={"steps": 4})


def start(mapping: dict[str, Any], *overrides: str, resume: bool | None = None) -> tuple[TrainResult, str]:
    """Train in this process; the result and what was printed."""
    stream = io.StringIO()
    config = load_run_config(mapping=mapping, overrides=overrides)
    return train(config, resume=resume, stream=stream), stream.getvalue()


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but what each start of the command writes."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("run.lock", "console.log"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_the_second_of_two_runs_refuses(tmp_path: Path, mapping: dict[str, Any]) -> None:
    mapping["train"]["steps"] = 100_000
    with Steep("train", write_yaml(mapping, tmp_path / "run.yaml")) as process:
        assert process.wait_for("step ")
        with pytest.raises(CheckpointError, match="in use by process") as refused:
            start(mapping)
        assert f"process {process.process.pid} on {socket.gethostname()}" in str(refused.value)
        assert process.process.poll() is None, "the first run goes on"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--optimizer.learning_rate", "2e-3"], "optimizer.learning_rate: saved 0.001, now 0.002"),
        (["--model.config.num_hidden_layers", "3"], "model.config.num_hidden_layers: saved 2, now 3"),
        (["--train.global_batch_size", "8"], "train.global_batch_size: saved 4, now 8"),
        (["--run.seed", "8"], "run.seed: saved 7, now 8"),
        (["--data.sequence_length", "32"], "data.sequence_length: saved 64, now 32"),
    ],
)
def test_another_run_is_refused_by_what_differs(
    overrides: list[str], named: str, mapping: dict[str, Any], tmp_path: Path
) -> None:
    start(mapping)
    run = tmp_path / "runs" / "small"
    before = contents(run)
    with pytest.raises(SteepError) as refused:
        start(mapping, *overrides)
    assert named in str(refused.value)
    assert "run.name" in str(refused.value)
    assert contents(run) == before, "a refusal changes nothing"


def test_changed_data_is_refused(mapping: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    start(mapping)
    before = contents(tmp_path / "runs" / "small")
    with (corpus / "003.txt").open("a") as file:
        file.write("one more sentence")
    with pytest.raises(CheckpointError, match="the data has changed"):
        start(mapping, "--train.steps", "6")
    assert contents(tmp_path / "runs" / "small") == before, "a refusal changes nothing"


def damage(corpus: Path, how: str) -> str:
    """Change the corpus, and what the refusal must name."""
    file = corpus / "003.txt"
    if how == "changed":
        file.write_text("another text")
    elif how == "truncated":
        file.write_text(file.read_text()[:10])
    elif how == "missing":
        file.unlink()
    elif how == "added":
        (corpus / "zzz.txt").write_text("one more document")
    else:
        first, second = file.read_text(), (corpus / "005.txt").read_text()
        file.write_text(second)
        (corpus / "005.txt").write_text(first)
        return "source 1: its files are in another order"
    word = {"truncated": "changed", "added": "new"}.get(how, how)
    return f"source 1: {word} {corpus / ('zzz.txt' if how == 'added' else '003.txt')}"


@pytest.mark.parametrize("how", ["changed", "truncated", "missing", "added", "reordered"])
def test_changed_data_is_named_and_taken_only_when_that_is_asked_for(
    how: str, mapping: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    start(mapping)
    named = damage(corpus, how)
    with pytest.raises(CheckpointError, match=re.escape(named)) as refused:
        start(mapping, "--train.steps", "6")
    assert "--accept-data-change" in str(refused.value)
    config = load_run_config(mapping=mapping, overrides=["--train.steps", "6"])
    said = io.StringIO()
    result = train(config, accept_data_change=True, stream=said)
    assert result.step == 6
    assert "the data has changed; the current data is used from sequence" in said.getvalue()
    ledger = json.loads((tmp_path / "runs" / "small" / "ledger.json").read_text())
    assert [change["changed"][-1] for change in ledger["data_changes"]] == [named]
    assert train(load_run_config(mapping=mapping, overrides=["--train.steps", "8"]), stream=io.StringIO()).step == 8


def test_a_source_may_be_dropped_or_moved_where_that_is_asked_for(
    mapping: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    """Each source keeps the count of its own tokens, and what was trained of one that is gone stays in the record."""
    (tmp_path / "second.txt").write_text("a text of another kind. " * 200)
    first = {"path": str(corpus), "name": "first", "weight": 1}
    second = {"path": str(tmp_path / "second.txt"), "name": "second", "weight": 3}

    def ledger(*sources: dict[str, Any], steps: str) -> dict[str, Any]:
        data = {**mapping["data"], "train": list(sources)}
        config = load_run_config(mapping={**mapping, "data": data}, overrides=["--train.steps", steps])
        train(config, accept_data_change=True, stream=io.StringIO())
        return json.loads((tmp_path / "runs" / "small" / "ledger.json").read_text())

    def tokens(found: dict[str, Any]) -> dict[str, int]:
        return {source["name"]: source["tokens_trained"] for source in found["sources"]}

    before = tokens(ledger(first, second, steps="4"))
    moved = ledger(second, first, steps="6")
    assert moved["data_changes"][0]["tokens_by_source"] == [before["first"], before["second"]]
    assert tokens(moved)["second"] > tokens(moved)["first"] > before["first"]
    run, begun = tmp_path / "runs" / "small", moved["data_changes"][0]["first_sequence"]
    config = load_run_config(mapping={**mapping, "data": {**mapping["data"], "train": [second, first]}})
    data = open_run_data(config, load_tokenizer(config.tokenizer, config.model), say_nothing)
    sequence = data.order.beginning_at(begun).sequence(begun + 1)
    shown = inspect(run, sequence=begun + 1)
    ranges = [(part["document"], part["start"], part["tokens"]) for part in shown["documents"]]
    store = data.stores[sequence.source]  # of documents that are held out in part, pieces are trained on
    expected = [(part.document, part.start, part.count) for part in sequence.ranges]
    if isinstance(store, CutStore):
        expected = [(*store.origin(document, start), count) for document, start, count in expected]
    assert ranges == expected
    with pytest.raises(ConfigError, match=f"was changed at sequence {begun}"):
        inspect(run, sequence=begun - 1)
    with pytest.raises(ConfigError, match="counted from 0"):
        inspect(run, sequence=-1)
    dropped = ledger(first, steps="8")
    assert list(tokens(dropped)) == ["first"]
    assert tokens(dropped)["first"] > tokens(moved)["first"]
    assert dropped["data_changes"][1]["tokens_by_source"] == [tokens(moved)["second"], tokens(moved)["first"]]


def test_a_phase_and_a_source_may_be_added_while_a_run_is_under_way(
    mapping: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    mapping["data"]["train"] = [{"path": str(corpus), "name": "first", "weight": 1}]
    start(mapping)
    (tmp_path / "second.txt").write_text("a text of another kind. " * 200)
    mapping["data"]["train"].append({"path": str(tmp_path / "second.txt"), "name": "second", "weight": 0})
    seen = 4 * mapping["train"]["global_batch_size"]
    phase = {"from_tokens": seen * mapping["data"]["sequence_length"], "weights": {"second": 1}}
    result, said = start({**mapping, "data": {**mapping["data"], "phases": [phase]}}, "--train.steps", "8")
    assert result.step == 8
    assert "the order changes from sequence" in said
    sources = json.loads((tmp_path / "runs" / "small" / "ledger.json").read_text())["sources"]
    assert sources[1]["tokens_trained"] > 0
    early = {"from_tokens": 1, "weights": {"second": 1}}
    with pytest.raises(CheckpointError, match="weights: the phases up to here"):
        start({**mapping, "data": {**mapping["data"], "phases": [early]}}, "--train.steps", "9")


def test_moved_data_is_the_same_data(mapping: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    start(mapping)
    shutil.move(corpus, tmp_path / "elsewhere")
    mapping["data"]["train"] = [{"path": str(tmp_path / "elsewhere")}]
    result, _ = start(mapping, "--train.steps", "6")
    assert result.step == 6


def test_what_does_not_change_learning_may_change(mapping: dict[str, Any], tmp_path: Path) -> None:
    mapping["train"]["max_seconds"] = 1e-6
    first, _ = start(mapping)
    assert first.status == "interrupted"
    del mapping["train"]["max_seconds"]
    overrides = ["--console.log_every_steps", "2", "--evaluate.tokens", "1000", "--checkpoint.every_steps", "1"]
    result, printed = start(mapping, *overrides)
    assert (result.status, result.step) == ("done", 4)
    assert "resuming from epoch_0_step_1" in printed


def test_resume_demands_and_no_resume_refuses_a_checkpoint(mapping: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        start(mapping, resume=True)
    start(mapping, resume=False)
    with pytest.raises(CheckpointError, match=r"already holds a run.*--run.name"):
        start(mapping, resume=False)
    result, _ = start(mapping, "--train.steps", "5", resume=True)
    assert result.step == 5


def test_a_finished_run_is_left_alone(mapping: dict[str, Any], tmp_path: Path) -> None:
    first, _ = start(mapping)
    before = contents(tmp_path / "runs" / "small")
    again, printed = start(mapping)
    assert "nothing left to train" in printed
    assert (again.status, again.exit_code, again.step, again.after) == ("done", 0, 4, first.after)
    assert contents(tmp_path / "runs" / "small") == before


def test_a_finished_run_can_be_made_longer_but_not_shorter(mapping: dict[str, Any], tmp_path: Path) -> None:
    start(mapping)
    with pytest.raises(ConfigError, match=r"has made 4 steps already.*to end after 3"):
        start(mapping, "--train.steps", "3")
    result, printed = start(mapping, "--train.steps", "8")
    assert (result.status, result.step) == ("done", 8)
    assert "train.steps: saved 4, now 8: the learning-rate schedule follows the new length" in printed
    assert [step for step, *_ in losses(tmp_path / "runs" / "small")] == list(range(8))


def test_a_run_of_constant_rate_made_longer_equals_one_that_was_long(mapping: dict[str, Any], tmp_path: Path) -> None:
    """Lengthening a run never changes its past; where the schedule does not look at the end, nor its future."""
    mapping["schedule"] = {"name": "constant"}
    start(mapping)
    start(mapping, "--train.steps", "8")
    start(mapping, "--train.steps", "8", "--run.name", "long")
    longer, long = tmp_path / "runs" / "small", tmp_path / "runs" / "long"
    assert losses(longer) == losses(long)
    assert final_weights(longer) == final_weights(long)


@pytest.mark.parametrize("micro_batch_size", ["1", "2"])
def test_another_micro_batch_size_takes_the_same_sequences(
    micro_batch_size: str, mapping: dict[str, Any], tmp_path: Path
) -> None:
    start(
        mapping, "--train.steps", "8", "--run.name", "straight", "--train.threads", "1", "--schedule.name", "constant"
    )
    start(mapping, "--schedule.name", "constant")
    _, printed = start(
        mapping, "--schedule.name", "constant", "--train.steps", "8", "--train.micro_batch_size", micro_batch_size
    )
    assert f"train.micro_batch_size: saved 4, now {micro_batch_size}: losses will equal" in printed
    straight, resumed = (tmp_path / "runs" / name for name in ("straight", "small"))
    expected, found = losses(straight), losses(resumed)
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], rel=1e-5)
    counts = [
        [(r["tokens"], r["sequences"]) for r in same_records(run) if r["kind"] == "train"]
        for run in (straight, resumed)
    ]
    assert counts[0] == counts[1]
