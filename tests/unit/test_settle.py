"""What `auto` became when a run began is what it means at every resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import steep
from steep.config.load import load_run_config
from steep.core.files import read_json, write_json
from steep.estimate.settle import settle, settled_before
from steep.runtime.cpu_speed import speed_file
from support import losses, run_mapping


def config_of(precision: str) -> Any:
    return load_run_config(
        mapping={
            "model": {"pretrained": "some/model"},
            "data": {"train": [{"path": __file__}]},
            "train": {"precision": precision, "device": "cpu", "threads": 1},
        }
    )


def test_a_resumed_run_takes_what_was_saved() -> None:
    for saved in ("fp32", "mixed_bf16", "mixed_fp16"):
        assert settle(config_of("auto"), {"train": {"precision": saved}}, print).train.precision == saved
    assert settle(config_of("bf16"), {"train": {"precision": "fp32"}}, print).train.precision == "bf16"


def test_a_run_of_an_earlier_version_is_told_by_its_plan() -> None:
    saved = {"train": {"precision": "auto", "steps": 3}}
    assert settled_before(saved, {"precision": "mixed_bf16"})["train"] == {"precision": "mixed_bf16", "steps": 3}
    assert settled_before(saved, None) == saved
    assert settled_before({"train": {"precision": "fp32"}}, {"precision": "bf16"})["train"]["precision"] == "fp32"


def test_a_resumed_run_does_not_measure_itself_into_another_precision(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "steep"))
    speed, known = speed_file(1), {"time": time.time()}
    speed.parent.mkdir(parents=True)
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"precision": "auto", "steps": 2})
    mapping["schedule"] = {"name": "constant"}
    write_json(speed, {**known, "fp32_flops": 2e10, "bf16_flops": 1e10})
    steep.train(mapping)
    write_json(speed, {**known, "fp32_flops": 1e10, "bf16_flops": 2e10})
    mapping["train"]["steps"] = 4
    result = steep.train(mapping, resume=True)
    assert load_run_config(result.run_directory / "config.yaml").train.precision == "fp32"
    log = (result.run_directory / "console.log").read_text()
    assert log.count("precision auto: fp32") == 1
    assert "mixed_bf16" not in log
    mapping["train"]["precision"], mapping["run"]["name"] = "fp32", "explicit"
    assert losses(steep.train(mapping).run_directory) == losses(result.run_directory)


TRACKER = """
import json
from pathlib import Path

class Tracker:
    def start(self, run_directory, config):
        (Path(run_directory) / "noted.json").write_text(json.dumps(config))

    def log(self, record):
        pass

    def close(self):
        pass
"""


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    """A run that leaves everything to steep, with a tracker of its own."""
    (tmp_path / "tracker.py").write_text(TRACKER)
    made = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"steps": 11})
    made["train"] |= {"micro_batch_size": "auto", "precision": "auto"}
    made["trackers"] = [{"_target_": f"{tmp_path / 'tracker.py'}:Tracker"}]
    return made


def test_trackers_note_and_a_plan_shows_what_the_run_chose(
    mapping: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = steep.train(mapping).run_directory
    noted, saved = read_json(run / "noted.json"), load_run_config(run / "config.yaml")
    assert noted["train"]["micro_batch_size"] == saved.train.micro_batch_size == mapping["train"]["global_batch_size"]
    assert noted["train"]["precision"] == saved.train.precision != "auto"
    other = "fp32" if saved.train.precision == "mixed_bf16" else "mixed_bf16"
    monkeypatch.setattr(
        "steep.estimate.hardware.choose_precision", lambda name, *_, **__: other if name == "auto" else name
    )
    assert steep.plan(mapping).precision == saved.train.precision
    mapping["run"]["name"] = "another"
    assert steep.plan(mapping).precision == other


def test_a_plan_of_a_run_that_has_begun_takes_what_it_chose(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, evaluate={"tokens": "auto"},
        train={"precision": "auto", "micro_batch_size": "auto", "global_batch_size": 8, "steps": 2},
    )  # fmt: skip
    new = steep.plan(mapping)
    assert "micro_batch_size auto: " in new.to_text()
    saved = load_run_config(steep.train(mapping).run_directory / "config.yaml")

    # as if the run had begun elsewhere, with other choices
    other = "bf16" if saved.train.precision == "fp32" else "fp32"
    path, chosen = tmp_path / "runs" / "small" / "config.yaml", {"micro_batch_size": 2, "tokens": 777}
    text = path.read_text().replace(f"precision: {saved.train.precision}", f"precision: {other}")
    for key, now in (("micro_batch_size", saved.train.micro_batch_size), ("tokens", saved.evaluate.tokens)):
        assert f"{key}: {now}\n" in text
        text = text.replace(f"{key}: {now}\n", f"{key}: {chosen[key]}\n")
    path.write_text(text)

    begun = steep.plan(mapping)
    assert (begun.precision, begun.sizes.micro_batch_size, begun.config.evaluate.tokens) == (other, 2, 777)
    shown = begun.to_text()
    assert "train.micro_batch_size 2" in shown
    assert f"train.precision {other}, " in shown
    assert " auto: " not in shown

    mapping["run"]["seed"] += 1
    different = steep.plan(mapping)
    assert "holds a different run, so train would refuse this one (run.seed: saved 7, now 8)" in different.to_text()
    assert different.sizes == new.sizes
