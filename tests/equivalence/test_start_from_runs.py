"""A run that starts from another run, and a run that goes on after what it started from is gone."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import steep
from steep.config.load import load_run_config
from steep.core.errors import ModelError
from steep.models.config import ModelConfig
from steep.models.load import load_model
from steep.training.loop import train
from support import LLAMA, losses, run_mapping


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> tuple[Path, dict[str, Any]]:
    """A folder with a base, and the settings of an adapter run `one` on it, which is finished."""
    folder = tmp_path_factory.mktemp("runs")
    load_model(ModelConfig(config=LLAMA), seed=1).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folder / "base")
    mapping = run_mapping(
        folder, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(folder / "base")}
    )
    mapping |= {"tokenizer": {}, "adapter": {"rank": 4}, "checkpoint": {"every_steps": 3, "keep_last": 1}}
    mapping["optimizer"] = {"learning_rate": 1e-2}
    run(mapping, "one")
    return folder, mapping


def run(mapping: dict[str, Any], name: str, **changes: Any) -> tuple[Path, str]:
    """The run's folder, and what it printed."""
    printed = io.StringIO()
    settings = {**mapping, **changes, "run": {**mapping["run"], "name": name}}
    settings["train"] = {**mapping["train"], **changes.get("train", {})}
    return train(load_run_config(mapping=settings), stream=printed).run_directory, printed.getvalue()


def weights(reference: Path | str) -> dict[str, torch.Tensor]:
    return dict(load_model(ModelConfig(pretrained=str(reference))).state_dict())


def score(run: Path, when: str) -> float:
    return float(json.loads((run / "summary.json").read_text())["texts"]["heldout"][when]["nats_per_token"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_starts_from_an_adapter_run_with_the_adapter_merged(world: tuple[Path, dict[str, Any]]) -> None:
    folder, mapping = world
    one = folder / "runs" / "one"
    start = {"model": {"pretrained": str(one)}, "train": {"steps": 1}}
    whole, said = run(mapping, "whole", **start, adapter=None)
    line = f"{folder / 'base'} with the adapter of {one} (epoch_0_step_6) added to its weights (merged)"
    assert line in said
    assert line in str(steep.plan({**mapping, **start, "adapter": None}))
    assert (
        steep.plan({**mapping, **start}).structure.trainable
        < steep.plan({**mapping, **start, "adapter": None}).structure.trainable
    )
    assert score(whole, "before") == pytest.approx(score(one, "after"), abs=1e-5)
    assert score(one, "after") < score(one, "before") - 0.01
    merged, base = weights(one), weights(folder / "base")
    adapter = load_file(one / "checkpoints" / "epoch_0_step_6" / "model" / "consolidated" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 16 / 4 * up @ down, atol=1e-6)


@pytest.mark.parametrize(
    "part", ["", "checkpoints", "checkpoints/epoch_0_step_6", "checkpoints/epoch_0_step_6/model/consolidated"]
)
def test_every_folder_of_a_run_names_its_model(world: tuple[Path, dict[str, Any]], part: str) -> None:
    folder, mapping = world
    start = folder / "runs" / "one" / part
    found = steep.plan({**mapping, "model": {"pretrained": str(start)}})
    assert found.structure.family == "llama"
    assert same(weights(start), weights(folder / "runs" / "one"))


def test_an_adapter_on_an_adapter_keeps_its_base_though_that_run_goes_on(world: tuple[Path, dict[str, Any]]) -> None:
    folder, mapping = world
    first = Path(shutil.copytree(folder / "runs" / "one", folder / "runs" / "first"))
    mapping = {**mapping, "checkpoint": {"every_steps": 3, "keep_last": 3}}
    start = {"model": {"pretrained": str(first)}, "train": {"steps": 3}}
    two, said = run(mapping, "two", **start)
    assert "only steep can load an adapter whose base is an adapter run" in said
    with pytest.raises(ModelError, match="an adapter on a base that is an adapter itself"):
        steep.export(two, to="adapter", out=folder / "adapter")
    before = weights(two)
    run(mapping, "first", train={"steps": 9})
    assert same(weights(two), before)
    _, said = run(mapping, "two", **{**start, "train": {"steps": 4}})
    assert f"{first} (epoch_0_step_6) added" in said
    assert "epoch_0_step_9" not in said
    shutil.rmtree(first / "checkpoints" / "epoch_0_step_6")
    with pytest.raises(ModelError, match="base is gone: the checkpoint epoch_0_step_6 of the run"):
        run(mapping, "two", **{**start, "train": {"steps": 5}})


def test_a_full_run_is_lengthened_from_its_own_files_alone(world: tuple[Path, dict[str, Any]]) -> None:
    folder, mapping = world
    base = Path(shutil.copytree(folder / "base", folder / "lost"))
    source = {"path": "auto", "role": "replay", "generate_tokens": 200}
    data = {**mapping["data"], "train": [*mapping["data"]["train"], source]}
    mapping = {**mapping, "adapter": None, "data": data, "vocabulary": {"add": ["lambda expression"]}}
    mapping |= {"model": {"pretrained": str(base)}}
    run(mapping, "kept")
    shutil.copytree(folder / "runs" / "kept", folder / "runs" / "orphan")
    longer = {"train": {"steps": 8}}
    kept, _ = run(mapping, "kept", **longer)
    shutil.rmtree(base)
    orphan, _ = run(mapping, "orphan", **longer)
    assert losses(orphan) == losses(kept)
    assert len(losses(kept)) == 8
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (orphan, kept)]
    assert plans[0]["model"] == plans[1]["model"]
    assert [planned["steps"] for planned in plans] == [8, 8]
    settings = {**mapping, "run": {**mapping["run"], "name": "orphan"}, "train": {**mapping["train"], "steps": 10}}
    assert "the run's own checkpoint" in str(steep.plan(settings))


def test_an_adapter_run_without_its_base_says_which_and_what_would_work(world: tuple[Path, dict[str, Any]]) -> None:
    folder, mapping = world
    base = Path(shutil.copytree(folder / "base", folder / "other"))
    mapping = {**mapping, "model": {"pretrained": str(base)}}
    path, _ = run(mapping, "poor", train={"steps": 2})
    base.rename(folder / "elsewhere")
    for attempt in (
        lambda: run(mapping, "poor", train={"steps": 3}),
        lambda: steep.plan({**mapping, "run": {**mapping["run"], "name": "poor"}}),
        lambda: steep.generate(path, "hello"),
        lambda: steep.plan({**mapping, "model": {"pretrained": str(path)}}),
    ):
        with pytest.raises(ModelError, match=rf"its base is gone: {base}\. .*ln -s NEW_PLACE {base}"):
            attempt()
    base.symlink_to(folder / "elsewhere")
    run(mapping, "poor", train={"steps": 3})
