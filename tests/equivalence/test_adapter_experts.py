"""Adapters on the stacked experts of a mixture: trained, resumed, merged, loaded by peft; what has no adapter is named."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import steep
from steep.config.load import load_run_config
from steep.core.errors import ConfigError
from steep.models.adapters import add_adapter
from steep.models.config import AdapterConfig, ModelConfig
from steep.models.fresh import build_fresh
from steep.models.load import load_model
from steep.training.loop import train
from support import LLAMA, losses, run_mapping

FAMILIES = {
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},  # transposed, with biases
}


def mixture(family: str) -> dict[str, Any]:
    sizes = {**LLAMA, **FAMILIES[family], "model_type": family, "num_experts_per_tok": 2}
    return {key: value for key, value in sizes.items() if family == "gpt_oss" or key != "head_dim"}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path,
    tiny_tokenizer_directory: Path,
) -> Any:  # fmt: skip
    """A run that has moved the experts by a lot, and its configuration."""
    folder = tmp_path_factory.mktemp("experts")
    load_model(ModelConfig(config=mixture(request.param)), seed=1).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folder / "base")
    mapping = run_mapping(
        folder, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(folder / "base")}
    )
    mapping["tokenizer"] = {}
    mapping["adapter"] = {"rank": 8, "experts": True}
    mapping["optimizer"] = {"learning_rate": 3e-2}
    output = io.StringIO()
    return train(load_run_config(mapping=mapping), stream=output), mapping, output.getvalue()


def newest(result: Any) -> Path:
    run = Path(result.run_directory)
    return run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text().strip() / "model" / "consolidated"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).unsqueeze(0), use_cache=False).logits


def test_the_merged_experts_score_what_training_scored_and_what_peft_computes(trained: Any) -> None:
    from peft import PeftModel

    result, mapping, output = trained
    assert "and 4 tensors of stacked experts" in output
    ours = load_model(ModelConfig(pretrained=str(result.run_directory)))
    base = AutoModelForCausalLM.from_pretrained(mapping["model"]["pretrained"])
    untrained = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, str(newest(result))))  # not merged
    assert torch.allclose(logits(ours), theirs, atol=1e-4)
    assert float((untrained - theirs).abs().max()) > 0.1
    tensors = load_file(newest(result) / "adapter_model.safetensors")
    of_experts = [tensor for name, tensor in tensors.items() if ".experts." in name and "lora_B" in name]
    assert len(of_experts) == 4
    assert all(float(tensor.abs().max()) > 1e-3 for tensor in of_experts)
    scored = steep.evaluate(result.run_directory, precision="fp32")
    assert scored.scores[0].nats_per_token == pytest.approx(result.after["heldout"]["nats_per_token"], abs=1e-5)


@pytest.mark.slow
def test_the_export_has_no_adapter_and_the_same_logits(trained: Any, tmp_path: Path) -> None:
    result, _, _ = trained
    steep.export(result.run_directory, to="hf", out=tmp_path / "hf", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.allclose(
        logits(model), logits(load_model(ModelConfig(pretrained=str(result.run_directory)))), atol=1e-5
    )
    steep.export(result.run_directory, to="hf", out=tmp_path / "bf16")  # compares with transformers' own attention
    steep.export(result.run_directory, to="adapter", out=tmp_path / "adapter")  # loads it back by peft and compares


def test_a_resumed_run_and_a_plan_agree(trained: Any, tmp_path: Path) -> None:
    result, mapping, _ = trained
    run = Path(shutil.copytree(result.run_directory, tmp_path / "small"))
    expected = losses(run)
    shutil.rmtree(run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text().strip())
    (run / "checkpoints" / "LATEST").write_text("epoch_0_step_4\n")
    again = {**mapping, "run": {**mapping["run"], "directory": str(tmp_path)}}
    train(load_run_config(mapping=again), stream=io.StringIO())
    assert losses(run) == expected
    trainable = steep.plan(again).structure.trainable
    assert trainable == sum(
        tensor.numel() for tensor in load_file(newest(result) / "adapter_model.safetensors").values()
    )


def test_all_linear_names_what_it_leaves_out() -> None:
    lines: list[str] = []
    model = build_fresh(mixture("qwen2_moe"), None, seed=0)
    stacked = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    gates = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith(".mlp.gate.weight"))
    share = (stacked + gates) / sum(parameter.numel() for parameter in model.parameters())
    add_adapter(model, AdapterConfig(rank=2), lines.append, base=None, seed=0)
    assert f"none on mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight ({100 * share:.2g}%" in lines[-1]
    assert "adapter.experts: true" in lines[-1]
    dense = build_fresh(LLAMA, None, seed=0)
    add_adapter(dense, AdapterConfig(rank=2), lines.append, base=None, seed=0)
    assert "none on" not in lines[-1]


@pytest.mark.parametrize(
    ("settings", "family", "message"),
    [
        ({}, "llama", "no stacked experts"),
        ({"dropout": 0.1}, "qwen2_moe", "adapter.dropout"),
        ({"type": "dora"}, "qwen2_moe", "dora"),
    ],
)
def test_what_experts_cannot_have_is_refused(settings: dict[str, Any], family: str, message: str) -> None:
    model = build_fresh(LLAMA if family == "llama" else mixture(family), None, seed=0)
    with pytest.raises(ConfigError, match=message):
        add_adapter(model, AdapterConfig(experts=True, **settings), print, base=None, seed=0)
