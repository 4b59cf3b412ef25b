"""What a run did to its model, end to end: a small model is taught general text, then other text, with and without replay."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import steep
from steep.config.load import load_run_config
from steep.training.loop import train
from support import LLAMA, run_mapping

STEPS = {"steps": 60, "global_batch_size": 8, "threads": 1, "precision": "fp32"}


def sums(start: int, count: int) -> list[str]:
    """Documents unlike any English text."""
    return [
        "\n".join(f"{n} + {k} = {n + k}; {n} * {k} = {n * k}" for k in range(3, 12))
        for n in range(start, start + count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    short = [text for text in documents if len(text) < 8000]
    return {
        "general": write_jsonl(folder / "general.jsonl", short[:60]),
        "general_held_out": write_jsonl(folder / "general_held_out.jsonl", short[60:66]),
        "sums": write_jsonl(folder / "sums.jsonl", sums(100, 60)),
        "sums_held_out": write_jsonl(folder / "sums_held_out.jsonl", sums(200, 8)),
    }


def run(
    directory: Path, name: str, texts: dict[str, str], tokenizer: Path, sources: list[Any], model: Any
) -> tuple[Path, str]:
    mapping = run_mapping(
        directory,
        Path(),
        tokenizer,
        run={"name": name},
        model=model,
        data={
            "train": sources,
            "validation": {"domain": {"path": texts["sums_held_out"]}, "general": {"path": texts["general_held_out"]}},
        },
        train=STEPS,
        optimizer={"learning_rate": 3e-3},
        checkpoint={"every_steps": 100},
        report={"enabled": True},
    )
    console = io.StringIO()
    result = train(load_run_config(mapping=mapping), stream=console)
    return result.run_directory, console.getvalue()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], tiny_tokenizer_directory: Path
) -> dict[str, tuple[Path, str]]:
    directory = tmp_path_factory.mktemp("forgetting")
    general, own = {"path": texts["general"], "name": "general"}, {"path": texts["sums"], "name": "sums"}
    made = {"base": run(directory, "base", texts, tiny_tokenizer_directory, [general], {"config": LLAMA})}
    pretrained = {"pretrained": str(made["base"][0])}
    made["alone"] = run(directory, "alone", texts, tiny_tokenizer_directory, [own], pretrained)
    half = [{**own, "weight": 0.5}, {**general, "weight": 0.5, "role": "replay"}]
    made["replay"] = run(directory, "replay", texts, tiny_tokenizer_directory, half, pretrained)
    half = [{**own, "weight": 0.5}, {"path": "auto", "weight": 0.5, "role": "replay", "generate_tokens": 30_000}]
    made["own text"] = run(directory, "self_generated", texts, tiny_tokenizer_directory, half, pretrained)
    return made


def summary(runs: dict[str, tuple[Path, str]], name: str) -> dict[str, Any]:
    return json.loads((runs[name][0] / "summary.json").read_text())


def test_training_on_other_text_alone_forgets_and_the_report_says_so(runs: dict[str, tuple[Path, str]]) -> None:
    report = summary(runs, "alone")["forgetting"]
    assert report["verdict"] == "forgot"
    assert report["loss_ratio"] > 0.02
    assert report["gain_ratio"] > 0.02
    assert "over the cap of +2.0 %" in runs["alone"][1]
    assert "learned the domain text but forgot some of the general text" in runs["alone"][1]
    end = runs["alone"][1].rstrip().splitlines()
    assert [line.partition(" ")[0] for line in end[-3:]] == ["done", "the", "report:"], (
        "three lines; the rest is in the report"
    )
    page = (runs["alone"][0] / "report.html").read_text()
    assert "Forgetting report" in page
    assert "Over the cap: general is" in page


def test_with_half_replay_it_does_not(runs: dict[str, tuple[Path, str]]) -> None:
    report = summary(runs, "replay")["forgetting"]
    assert report["verdict"] == "kept"
    assert report["gain_ratio"] > 0.02
    assert "under the cap of +2.0 %" in runs["replay"][1]
    assert "over the cap" not in runs["replay"][1]


def test_replay_that_the_base_wrote_keeps_most_of_what_it_knew(runs: dict[str, tuple[Path, str]]) -> None:
    alone, self_generated = (summary(runs, name)["forgetting"] for name in ("alone", "own text"))
    assert self_generated["loss_ratio"] < alone["loss_ratio"] / 3
    assert self_generated["gain_ratio"] > 0.02
    assert "tokens in" in runs["own text"][1]
    assert "that base wrote itself" in runs["own text"][1]


def test_a_run_from_fresh_weights_has_nothing_to_forget(runs: dict[str, tuple[Path, str]]) -> None:
    assert "forgetting" not in summary(runs, "base")
    assert "forgetting report" not in runs["base"][1]
    assert "No forgetting report: the run started from fresh weights" in (runs["base"][0] / "report.html").read_text()


def test_evaluate_against_base_gives_the_same_report(runs: dict[str, tuple[Path, str]]) -> None:
    evaluation = steep.evaluate(runs["alone"][0], against="base", precision="fp32")
    given, expected = evaluation.to_mapping()["forgetting"], summary(runs, "alone")["forgetting"]
    assert given["verdict"] == expected["verdict"]
    assert given["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert given["gain"] == pytest.approx(expected["gain"], abs=1e-5)
    assert "over the cap: general is" in evaluation.to_text()
