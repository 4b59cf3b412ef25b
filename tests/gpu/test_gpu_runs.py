"""What runs on a GPU: the same losses as on a CPU, quantized bases, every optimizer, text of the model's own, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import steep
from steep.models.fresh import build_fresh
from steep.optim.config import options_of_optimizers
from support import LLAMA, losses, run_mapping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE = {**LLAMA, "hidden_size": 128, "intermediate_size": 256}
"""Wide enough for the kernels of quantized layers."""
ADAPTER = {"rank": 8, "alpha": 16}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "ema": {"train": {"ema_decay": 0.9}},
    "checkpointed": {"train": {"activation_checkpointing": True}},
    "checkpointed_selective": {"train": {"activation_checkpointing": "selective"}},
    "checkpointed_offloaded": {"train": {"activation_checkpointing": {"mode": "full", "offload": True}}},
    "micro_batches": {"train": {"micro_batch_size": 1}},
    "lora": {"adapter": ADAPTER},
    "dora": {"adapter": {**ADAPTER, "type": "dora"}},
    "lora_and_embeddings": {"adapter": {**ADAPTER, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "lora_offloaded_embeddings": {
        "adapter": ADAPTER,
        "model": {"offload_embeddings": True},
        "evaluate": {"prompts": ["The "], "sample_tokens": 4},
    },
    "new_tokens": {"vocabulary": {"add": ["statement", "expression"]}},
    "longer_context": {"model": {"rope": {"type": "yarn", "factor": 2}}, "data": {"sequence_length": 160}},
}
RATES = {"adafactor": 0.05, "lion": 1e-3, "muon": 1e-2, "galore": 1e-2}
OPTIMIZER_OPTIONS: dict[str, dict[str, Any]] = {"galore": {"rank": 8, "projection_interval_steps": 5}}


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    build_fresh({**WIDE, "tie_word_embeddings": False}, None, seed=0).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(tmp_path / "base")
    found = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(tmp_path / "base")}
    )
    del found["tokenizer"]
    return found


@pytest.fixture(autouse=True)
def any_kernel() -> Iterator[None]:
    """A deterministic run leaves torch deterministic; the next test begins without."""
    yield
    torch.use_deterministic_algorithms(False)


def changed(mapping: dict[str, Any], name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    merged = {section: {**mapping.get(section, {}), **values} for section, values in changes.items()}
    return {**mapping, **merged, "run": {**mapping["run"], "name": name}}


@pytest.mark.parametrize("case", sorted(CASES))
def test_losses_are_those_of_the_cpu(mapping: dict[str, Any], case: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        here = changed(mapping, device, **CASES[case])
        here["train"] = {**here["train"], "device": device}
        found[device] = losses(steep.train(here).run_directory)
    assert len(found["cpu"]) == 6
    for (_, loss, norm), (_, expected_loss, expected_norm) in zip(found["cuda"], found["cpu"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-4)
        assert norm == pytest.approx(expected_norm, rel=5e-3)


@pytest.mark.parametrize("name", sorted(options_of_optimizers()))
def test_every_optimizer_learns_and_resumes_bitwise(mapping: dict[str, Any], name: str) -> None:
    if name.startswith("adamw_8bit"):
        pytest.importorskip(
            "torchao" if name.endswith("torchao") else "bitsandbytes", reason="the extra quant is not there"
        )
    options = {"name": name, "learning_rate": RATES.get(name, 3e-3), **OPTIMIZER_OPTIONS.get(name, {})}
    common: dict[str, Any] = {"optimizer": options, "schedule": {"name": "constant", "warmup_steps": 2}}
    train = {"steps": 12, "device": "cuda", "precision": "mixed_bf16", "deterministic": True}
    steep.train(changed(mapping, "whole", train=train, **common))
    parted = changed(mapping, "parted", train={**train, "max_seconds": 1e-6}, **common)
    for _ in range(2):
        steep.train(parted)
    del parted["train"]["max_seconds"]
    assert len(losses(Path(mapping["run"]["directory"]) / "parted")) == 2
    lines = losses(steep.train(parted).run_directory)
    assert lines == losses(Path(mapping["run"]["directory"]) / "whole")
    assert lines[-1][1] < lines[0][1] - 0.05


@pytest.mark.parametrize("precision", ["mixed_bf16", "fp32"])
@pytest.mark.parametrize("method", ["nf4", "int8", "torchao_int8"])
def test_an_adapter_on_a_quantized_base_learns(mapping: dict[str, Any], method: str, precision: str) -> None:
    for package in ("bitsandbytes", "torchao"):
        pytest.importorskip(package, reason="the extra quant is not there")
    here = changed(
        mapping, method, model={"quantize": method}, adapter={**ADAPTER, "modules_to_save": ["embed_tokens", "lm_head"]},
        optimizer={"name": "adamw_8bit", "learning_rate": 1e-2},
        train={"device": "cuda", "precision": precision, "steps": 12, "activation_checkpointing": {"offload": True}},
    )  # fmt: skip
    run = steep.train(here).run_directory
    lines = losses(run)
    assert lines[-1][1] < lines[0][1] - 0.2
    assert steep.generate(run, "The ", max_new_tokens=8)
    exported = steep.export(run, to="adapter")
    assert (exported.path / "adapter_model.safetensors").is_file()


def test_compiled_layers_train(mapping: dict[str, Any]) -> None:
    for compiled in (False, True):
        steep.train(
            changed(mapping, str(compiled), train={"device": "cuda", "precision": "mixed_bf16", "compile": compiled})
        )
    plain, other = (losses(Path(mapping["run"]["directory"]) / name) for name in ("False", "True"))
    assert [loss for _, loss, _ in other] == pytest.approx([loss for _, loss, _ in plain], rel=5e-3)


def test_a_run_writes_its_own_replay_and_is_exported(mapping: dict[str, Any]) -> None:
    here = changed(mapping, "own", train={"device": "cuda", "precision": "mixed_bf16"})
    here["recipe"] = "continued_pretraining"
    here["data"] = {
        **here["data"],
        "train": [*here["data"]["train"], {"path": "auto", "role": "replay", "generate_tokens": 3_000}],
        "validation": {"heldout": {"share": 0.1}, "general": {"path": "auto", "generate_tokens": 1_000}},
    }
    run = steep.train(here).run_directory
    assert json.loads((run / "ledger.json").read_text())["sources"][1]["tokens_trained"] > 0
    assert json.loads((run / "summary.json").read_text())["forgetting"]["texts"]
    assert steep.evaluate(run, against="base", device="cuda").scores
    for form in ("hf", "gguf"):
        assert steep.generate(steep.export(run, to=form).path, "The ", max_new_tokens=4, device="cuda")


def test_learning_rates_are_swept(mapping: dict[str, Any]) -> None:
    found = steep.lr_find(changed(mapping, "find", train={"device": "cuda"}), rates=[1e-4, 1e-3], steps=4)
    assert found.learning_rate in (1e-4, 1e-3)
