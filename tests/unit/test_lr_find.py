"""steep lr-find: every rate starts at the base, and the smallest good one is proposed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import steep
from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.models.fresh import build_fresh
from steep.training.lr_find import LearningRates, Trial, choose, explain, rates_plot, shortened
from support import LLAMA, run_mapping

BASE = {"own": 5.0, "general": 3.0}


def trial(rate: float, own: float | None) -> Trial:
    return Trial(rate, None, [5.0], {} if own is None else {"own": own, "general": 3.0})


def test_the_smallest_rate_that_gains_nearly_as_much_is_chosen() -> None:
    trials = [trial(1e-5, 4.9), trial(1e-4, 4.05), trial(1e-3, 4.0), trial(1e-2, None)]
    best = choose(BASE, trials, ["own"])
    assert best.learning_rate == 1e-4
    assert "95% of the gain at 0.001" in explain(BASE, trials, best, ["own"])


def test_a_best_rate_at_the_edge_is_said() -> None:
    trials = [trial(1e-5, 4.9), trial(1e-4, 4.0)]
    assert "try higher ones" in explain(BASE, trials, choose(BASE, trials, ["own"]), ["own"])


def test_no_gain_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no rate made the domain text better"):
        choose(BASE, [trial(1e-5, 5.1), trial(1e-4, None)], ["own"])


def test_the_rates_tried_are_the_labels_of_the_picture() -> None:
    trials = [
        Trial(1e-4, None, [3.0], {"own": 2.5}),
        Trial(3e-4, None, [3.0], {"own": 2.0}),
        Trial(1e-3, None, [9.0], {}),
    ]
    found = LearningRates(3e-4, None, "", {"own": 3.0}, trials, ["own"], 6, Path("lr_find.json"))
    figure = rates_plot(found, "manuals")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0001", "0.0003", "0.001\ndiverged"]
    assert not axes.xaxis.get_minorticklocs().size
    assert figure.get_suptitle() == "manuals: learning rates after 6 steps"
    assert {line.get_label() for line in axes.lines} == {"own", "own, base", "proposed"}


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    return run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory)


def test_a_sweep_starts_each_rate_at_the_base_and_proposes(mapping: dict[str, Any], tmp_path: Path) -> None:
    found = steep.lr_find(mapping, rates=[1e-5, 3e-3, 1e-2], steps=6)
    assert len({trial.training_losses[0] for trial in found.trials}) == 1  # bit for bit the same first loss
    assert found.learning_rate in (3e-3, 1e-2)
    assert found.trials[1].losses["heldout"] < found.base["heldout"]
    folder = Path(mapping["run"]["directory"]) / mapping["run"]["name"]
    written = json.loads((folder / "lr_find" / "lr_find.json").read_text())
    assert written["learning_rate"] == found.learning_rate
    assert (folder / "lr_find" / "lr_find.png").stat().st_size > 5000
    assert f"--optimizer.learning_rate {found.learning_rate:.2g}" in found.to_text()
    assert not (folder / "checkpoints").exists()
    again = steep.lr_find(mapping, rates=[1e-2, 3e-3], steps=6)  # neither order nor the other rates matter
    assert [t.losses for t in again.trials] == [t.losses for t in found.trials[1:]]


def test_the_rate_of_the_first_trial_is_that_of_a_run(mapping: dict[str, Any]) -> None:
    """What a trial does is what `steep train` does at a constant rate after the same warmup."""
    found = steep.lr_find(mapping, rates=[1e-3, 2e-3], steps=5)
    mapping["optimizer"] = {"learning_rate": 1e-3}
    mapping["schedule"] = {"name": "constant", "warmup_steps": 1}
    mapping["train"] = {**mapping["train"], "steps": 5}
    steep.train(mapping)
    folder = Path(mapping["run"]["directory"]) / mapping["run"]["name"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses == pytest.approx(found.trials[0].training_losses, rel=1e-6)


def test_embeddings_beside_an_adapter_get_a_sweep_of_their_own(mapping: dict[str, Any], tmp_path: Path) -> None:
    build_fresh(LLAMA, None, seed=0).save_pretrained(tmp_path / "base")
    mapping["model"] = {"pretrained": str(tmp_path / "base")}
    mapping["adapter"] = {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    found = steep.lr_find(mapping, rates=[1e-3, 1e-2], steps=5)
    assert len(found.trials) == 2 + 4
    assert found.embedding_learning_rate in [t.embedding_learning_rate for t in found.trials[2:]]
    assert "--optimizer.embedding_learning_rate" in found.to_text()


@pytest.mark.parametrize(
    ("changes", "rates", "problem"),
    [
        ({"data.validation": {}}, None, "judges by held-out text"),
        ({}, [1e-3], "at least two"),
        ({}, [1e-3, -1.0], "all above 0"),
    ],
)
def test_what_cannot_be_swept_is_refused(mapping: dict[str, Any], changes: Any, rates: Any, problem: str) -> None:
    for key, value in changes.items():
        section, name = key.split(".")
        mapping[section] = {**mapping[section], name: value}
    with pytest.raises(ConfigError, match=problem):
        steep.lr_find(mapping, rates=rates)


def test_trials_keep_no_moving_average() -> None:
    """It would take memory that the run was not planned with, and no score looks at it."""
    mapping = {"model": {"config": {}}, "data": {"train": [{"path": "text"}]}, "train": {"ema_decay": 0.9}}
    config = RunConfig.model_validate(mapping)
    assert shortened(config, 5).train.ema_decay is None
