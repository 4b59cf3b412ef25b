"""Text that the base model writes: drawn from its own distribution, written once, and used as replay and as a held-out text."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import steep
from steep.config.load import load_run_config
from steep.core.errors import ConfigError, DataError
from steep.core.files import TEMPORARY_PREFIX
from steep.core.say import say_nothing
from steep.data.self_generated import with_self_generated
from steep.evaluation.text_writer import open_writer, sample_documents
from steep.models.fresh import build_fresh
from support import LLAMA, run_mapping, write_yaml

END = 7


def test_documents_are_drawn_from_the_models_distribution() -> None:
    """Three tokens of eight ids: every possible document as often as the model's own whole forward passes say."""
    model: Any = build_fresh({**LLAMA, "vocab_size": 10, "initializer_range": 0.4}, None, seed=3).eval()
    documents = sample_documents(model, 0, {END}, count=20_000, max_tokens=3, vocab_size=8, seed=1)
    expected: dict[tuple[int, ...], float] = {}

    def follow(ids: tuple[int, ...], probability: float) -> None:
        if len(ids) == 3 or (ids and ids[-1] == END):
            expected[ids] = probability
            return
        with torch.no_grad():
            weights = model(input_ids=torch.tensor([[0, *ids]])).logits[0, -1, :8].softmax(-1).tolist()
        for token, weight in enumerate(weights):
            follow((*ids, token), probability * weight)

    follow((), 1.0)
    found = Counter(map(tuple, documents))
    assert set(found) <= set(expected)
    assert any(len(ids) < 3 for ids in found)
    far = sum(abs(found[ids] / 20_000 - probability) for ids, probability in expected.items()) / 2
    uniform = sum(abs(1 / len(expected) - probability) for probability in expected.values()) / 2
    assert far < 0.05 < uniform / 3  # a draw's distance from what it was drawn from, and that of another distribution


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    build_fresh({**LLAMA, "initializer_range": 0.2}, None, seed=1).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(tmp_path / "base")
    mapping = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(tmp_path / "base")}
    )
    del mapping["tokenizer"]
    mapping["recipe"] = "continued_pretraining"
    mapping["data"]["train"].append({"path": "auto", "role": "replay", "generate_tokens": 3_000})
    mapping["data"]["validation"]["general"] = {"path": "auto", "generate_tokens": 1_000}
    return mapping


def written_files(mapping: dict[str, Any]) -> dict[str, bytes]:
    folder = Path(mapping["data"]["cache_directory"]) / "written"
    paths = [path for path in sorted(folder.rglob("*.json*")) if not path.name.startswith(TEMPORARY_PREFIX)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_run_replays_what_its_base_wrote_and_measures_on_it(
    mapping: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = steep.plan(mapping)
    assert not written_files(mapping)  # planning loads no weight
    assert "the base model writes 3,000 tokens of replay" in plan.to_text()
    own = Path(mapping["data"]["train"][0]["path"]).name
    assert [text.name for text in plan.data.held_out_texts] == [
        own
    ]  # the share of a text that is not written yet is not there
    run = steep.train(mapping)
    said = capsys.readouterr().out
    assert "data.train.1: 3," in said
    assert "that base wrote itself" in said
    assert "data.validation.general: 1," in said
    files = written_files(mapping)
    train, held_out = ([name for name in files if name.endswith(f"/{tokens}.jsonl")] for tokens in (3000, 1000))
    assert len(train) == len(held_out) == 1
    lines = [files[name[0]].splitlines() for name in (train, held_out)]
    assert not set(lines[0]) & set(lines[1])  # another draw, not a part of the same
    ledger = json.loads((run.run_directory / "ledger.json").read_text())
    replay = ledger["sources"][1]
    assert (replay["name"], replay["role"], replay["documents_kept"]) == (
        "auto",
        "replay",
        sum(json.loads(line)["text"] != "" for line in lines[0]),
    )
    assert replay["tokens_trained"] > 0
    report = json.loads((run.run_directory / "summary.json").read_text())["forgetting"]
    roles = {own: "domain", "auto": "general", "general": "general"}
    assert {text["text"]: text["role"] for text in report["texts"]} == roles
    counts = {source["name"]: source["share"] for source in plan.to_mapping()["data"]["sources"]}
    assert counts["auto"] == pytest.approx(1 / 24)
    assert steep.evaluate(run.run_directory, against="base").scores
    assert written_files(mapping) == files  # read, not written again


@pytest.mark.parametrize("length", [{"epochs": 1}, {"steps": 6}])
def test_a_plan_takes_unwritten_text_for_as_long_as_it_will_be(mapping: dict[str, Any], length: dict[str, int]) -> None:
    """Without weights every sequence counts once. The text will be a little longer: whole batches, and EOS where it was cut."""
    del mapping["recipe"], mapping["data"]["validation"]["general"], mapping["train"]["steps"]
    mapping["train"].update(length)
    before = steep.plan(mapping)
    with_self_generated(load_run_config(mapping=mapping), say_nothing, open_writer)
    after = steep.plan(mapping)
    assert before.data.order.sequences_of_source[1] == math.ceil(3_000 / 64)
    assert before.sizes.steps == pytest.approx(after.sizes.steps, rel=0.02)


def test_a_plan_refuses_too_many_epochs_of_unwritten_text(mapping: dict[str, Any]) -> None:
    mapping["data"]["train"][0].update({"weight": 0.5})
    mapping["data"]["train"][1].update({"weight": 0.5, "max_epochs": 2})
    mapping["train"]["steps"] = 200
    with pytest.raises(ConfigError, match="auto"):
        steep.plan(mapping)


def test_more_text_is_the_same_text_and_some(mapping: dict[str, Any]) -> None:
    config = load_run_config(mapping=mapping)
    with_self_generated(config, say_nothing, open_writer)
    few = {name: data for name, data in written_files(mapping).items() if "batch" in name}
    mapping["data"]["train"][1]["generate_tokens"] = 6_000
    lines: list[str] = []
    replaced = with_self_generated(load_run_config(mapping=mapping), lines.append, open_writer)
    more = written_files(mapping)
    assert len(more) > len(few)
    assert all(more[name] == data for name, data in few.items())
    path = Path(str(replaced.data.train[1].path))
    texts = [json.loads(text)["text"] for text in path.read_text().splitlines()]
    assert len(texts) % 16 == 0
    assert f"{len(texts)} documents" in lines[0]
    assert len(lines) == 2
    other = load_run_config(mapping={**mapping, "run": {**mapping["run"], "seed": 8}})
    assert with_self_generated(other, say_nothing, open_writer).data.train[1].path != replaced.data.train[1].path


def test_a_killed_writer_goes_on_where_it_was(mapping: dict[str, Any], tmp_path: Path) -> None:
    mapping["data"]["train"][1]["generate_tokens"] = 20_000
    file = write_yaml(mapping, tmp_path / "run.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "steep", "train", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:  # fmt: skip
        for _ in range(600):
            if sum("batch" in name for name in written_files(mapping)) >= 2:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    killed = {name: data for name, data in written_files(mapping).items() if "batch" in name}
    assert len(killed) >= 2
    assert not any(name.endswith("/20000.json") for name in written_files(mapping))
    with_self_generated(load_run_config(mapping=mapping), say_nothing, open_writer)
    whole = written_files(mapping)
    assert all(whole[name] == data for name, data in killed.items())
    assert any(name.endswith("/20000.json") for name in whole)


def test_nothing_is_written_for_a_run_whose_other_text_is_bad(mapping: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    mapping["data"]["validation"]["domain"] = {"path": str(tmp_path / "bad.jsonl")}
    with pytest.raises(DataError, match="not JSON"):
        steep.train(mapping)
    assert not written_files(mapping)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"role": "train"}, "give it role: replay"),
        ({"stream": True}, "and no stream"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything(
    mapping: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    mapping["data"]["train"][1].update(changes)
    del mapping["data"]["validation"]["heldout"]  # a share, which a stream cannot hold out
    with pytest.raises(ConfigError, match=says):
        load_run_config(mapping=mapping)


def test_fresh_weights_have_nothing_to_say(mapping: dict[str, Any], tiny_tokenizer_directory: Path) -> None:
    mapping["model"], mapping["tokenizer"] = {"config": LLAMA}, {"pretrained": str(tiny_tokenizer_directory)}
    with pytest.raises(ConfigError, match="fresh weights cannot write any"):
        load_run_config(mapping=mapping)
