"""NaN and infinity: named before step 0, never saved, and no good checkpoint is deleted for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import steep
from steep.checkpoint.finite import not_finite
from steep.core.errors import CheckpointError, ModelError
from support import LLAMA, run_mapping

DIVERGING = '''
import torch


class Diverging(torch.optim.AdamW):
    """Spoils one number at its fifth step."""

    def __init__(self, params, where="weights"):
        super().__init__(params, lr=1e-3)
        self.where, self.calls = where, 0

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        if self.calls == 5:
            parameter = self.param_groups[0]["params"][0]
            spoilt = parameter.data if self.where == "weights" else self.state[parameter]["exp_avg"]
            spoilt[7, 3] = float("nan") if self.where == "weights" else float("inf")
'''


def test_what_is_not_finite_is_named_with_its_row() -> None:
    matrix, vector = torch.zeros(9, 4), torch.ones(3, dtype=torch.bfloat16)
    named = [
        ("matrix", matrix),
        ("vector", vector),
        ("ids", torch.zeros(2, dtype=torch.int64)),
        ("none", torch.zeros(0)),
    ]
    assert not_finite(named) == ""
    matrix[7, 3], vector[0] = float("nan"), float("-inf")
    assert not_finite(named) == "matrix (1 of 36 numbers, in row 7), vector (1 of 3 numbers)"
    matrix[2] = float("inf")
    assert not_finite(named).startswith("matrix (5 of 36 numbers, in 2 rows, the first 2)")


@pytest.mark.parametrize(("where", "named"), [("weights", "weight"), ("moments", "exp_avg")])
def test_a_run_that_diverges_keeps_its_good_checkpoint(
    where: str, named: str, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    """on_spike: skip goes on after a NaN loss, so the next save comes with what is spoilt."""
    (tmp_path / "diverging.py").write_text(DIVERGING)
    mapping: dict[str, Any] = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, train={"steps": 8, "on_spike": "skip"},
        checkpoint={"every_steps": 2, "keep_last": 1, "keep_best": False, "asynchronous": True},
    )  # fmt: skip
    mapping["optimizer"] = {"_target_": f"{tmp_path / 'diverging.py'}:Diverging", "where": where}
    with pytest.raises(
        CheckpointError, match=rf"NaN or infinity in .*{named}.* \(1 of .*, in row 7\); the run can go on from"
    ) as caught:
        steep.train(mapping)
    left = sorted(path.name for path in (tmp_path / "runs/small/checkpoints").iterdir())
    assert left == ["LATEST", "epoch_0_step_4"]
    assert "epoch_0_step_4" in str(caught.value)


def test_a_base_with_nan_is_refused_before_step_0(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    with torch.no_grad():
        model.get_input_embeddings().weight[11, 0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    mapping = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(tmp_path / "base")}
    )
    with pytest.raises(ModelError, match=r"base has weights that are NaN.*embed_tokens.weight \(1 of .*, in row 11\)"):
        steep.train(mapping)
