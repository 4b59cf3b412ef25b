"""Recipes fill in what the user leaves out, say so with a source, and never speak over the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steep.config.load import dump_yaml, load_run_config
from steep.config.recipes import RECIPES, recipe_lines
from steep.config.yaml_file import parse_yaml
from steep.core.errors import ConfigError


@pytest.fixture
def least(tmp_path: Any) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    return {
        "model": {"pretrained": "org/model"},
        "data": {"train": [{"path": str(tmp_path / "a.txt")}], "validation": {"own": {"share": 0.5}}},
    }


def test_what_is_left_out_comes_from_the_recipe(least: dict[str, Any]) -> None:
    plain = load_run_config(mapping=least)
    config = load_run_config(mapping={**least, "recipe": "continued_pretraining"})
    assert (plain.optimizer.learning_rate, config.optimizer.learning_rate) == (3e-4, 2e-5)
    assert (plain.evaluate.every_ratio, config.evaluate.every_ratio) == (None, 0.2)
    assert config.schedule.warmup_ratio == 0.01
    assert config.adapter is None
    assert load_run_config(mapping={**least, "recipe": "pretraining"}).optimizer.learning_rate == 6e-4


def test_the_user_has_the_last_word_even_with_null_and_from_the_command_line(least: dict[str, Any]) -> None:
    mine = {**least, "recipe": "continued_pretraining", "train": {"max_grad_norm": None}, "schedule": {"warmup_steps": 3},
            "evaluate": {"every_steps": 7}}  # fmt: skip
    config = load_run_config(mapping=mine, overrides=["--optimizer.learning_rate", "1e-3"])
    assert config.optimizer.learning_rate == 1e-3
    assert config.train.max_grad_norm is None
    assert (config.schedule.warmup_steps, config.schedule.warmup_ratio) == (3, None)
    assert (config.evaluate.every_steps, config.evaluate.every_ratio) == (7, None)
    lines = recipe_lines(config.to_mapping())
    assert "  optimizer.learning_rate 0.001: yours (the recipe has 2e-05)" in lines
    assert not any("warmup" in line or "every_" in line for line in lines)


def test_an_adapter_gets_the_recipes_values_and_rate(least: dict[str, Any]) -> None:
    config = load_run_config(mapping={**least, "recipe": "continued_pretraining", "adapter": {"rank": 8}})
    assert config.adapter is not None
    assert (config.adapter.rank, config.adapter.rslora, config.adapter.alpha) == (8, True, 32.0)
    assert config.optimizer.learning_rate == 2e-4
    assert "  adapter.rank 8: yours (the recipe has 128)" in recipe_lines(config.to_mapping())


def test_wsd_has_a_cooldown_of_its_own(least: dict[str, Any]) -> None:
    config = load_run_config(mapping={**least, "recipe": "continued_pretraining", "schedule": {"name": "wsd"}})
    assert (config.schedule.final_ratio, config.schedule.decay_ratio) == (0.0, 0.2)
    assert config.schedule.decay_shape == "one_minus_sqrt"


def test_replay_is_a_twentieth_where_the_user_says_no_weights(least: dict[str, Any], tmp_path: Any) -> None:
    least["data"]["train"].append({"path": str(tmp_path / "b.txt"), "role": "replay"})
    config = load_run_config(mapping={**least, "recipe": "continued_pretraining"})
    assert [source.weight for source in config.data.train] == [0.95, 0.05]
    assert any("replay 5.0% of the tokens" in line for line in recipe_lines(config.to_mapping()))
    least["data"]["train"].pop()
    without = load_run_config(mapping={**least, "recipe": "continued_pretraining"})
    assert any("replay none" in line and "role: replay" in line for line in recipe_lines(without.to_mapping()))


def test_a_target_keeps_its_own_arguments(least: dict[str, Any]) -> None:
    target = {"_target_": "torch.optim.SGD", "lr": 0.1}
    config = load_run_config(mapping={**least, "recipe": "continued_pretraining", "optimizer": target})
    assert config.to_mapping()["optimizer"] == target


def test_the_resolved_configuration_loads_to_itself_and_an_unknown_recipe_is_refused(least: dict[str, Any]) -> None:
    config = load_run_config(mapping={**least, "recipe": "continued_pretraining", "adapter": {}})
    again = load_run_config(mapping=parse_yaml(dump_yaml(config.to_mapping())).data)
    assert again == config
    assert recipe_lines(load_run_config(mapping=least).to_mapping()) == []
    with pytest.raises(ConfigError, match="continued_pretraining"):
        load_run_config(mapping={**least, "recipe": "continued_pretrainin"})


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_is_printed_with_its_source(least: dict[str, Any], name: str) -> None:
    config = load_run_config(mapping={**least, "recipe": name})
    lines = "\n".join(recipe_lines(config.to_mapping()))
    assert "yours" not in lines
    assert all(default.source in lines for default in RECIPES[name] if default.needs is None)


def test_the_reference_page_holds_the_values() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    for default in {d for recipe in RECIPES.values() for d in recipe}:
        assert default.key.rpartition(".")[2] in page or default.key.partition(".")[0] in page, default.key
        paper = default.source.rpartition("arXiv:")[2]
        assert paper in page or "arXiv" not in default.source, default.source
