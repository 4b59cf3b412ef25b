"""Plans that know checkpointing, offloading, quantized bases and adapters, and `steep plan --fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import steep
from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.estimate.structure import measure_structure
from support import LLAMA, run_mapping

MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
WIDE_LLAMA = {**LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    return run_mapping(
        tmp_path,
        corpus_directory,
        tiny_tokenizer_directory,
        model={"config": WIDE_LLAMA},
        train={"global_batch_size": 64, "steps": 2, "device": "cpu"},
    )


def activations(mapping: dict[str, Any], checkpointing: Any, device: str = "cpu") -> int:
    train = {**mapping["train"], "activation_checkpointing": checkpointing}
    return steep.plan({**mapping, "train": train}, device=device).structure.memory.activations


def test_the_guides_mistral_run_is_planned_within_a_tenth_of_what_it_took() -> None:
    """9.332 GiB reserved at its peak: 4-bit Mistral-7B-v0.3, rank 128 on all linear layers, embeddings and head in full, 8-bit
    AdamW, 8 micro-batches of 2 x 2,048 tokens, activations checkpointed and held in host memory."""
    config = RunConfig.model_validate(
        {
            "model": {"config": MISTRAL_7B, "quantize": "nf4"},
            "adapter": {"rank": 128, "alpha": 32, "rslora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
            "data": {"sequence_length": 2048, "train": [{"path": "unused"}]},
            "optimizer": {"name": "adamw_8bit", "learning_rate": 5e-5},
            "train": {
                "global_batch_size": 16,
                "micro_batch_size": 2,
                "steps": 156,
                "activation_checkpointing": {"mode": "full", "offload": True},
            },
        }
    )
    facts = measure_structure(config, 2, accumulates=True, precision="mixed_bf16", on_gpu=True)
    assert facts.trainable == 603_979_776  # as the guide's run prints
    assert sum(facts.memory.parts("cuda").values()) == pytest.approx(9.332 * 2**30, rel=0.1)


def test_more_checkpointing_is_less_memory(mapping: dict[str, Any]) -> None:
    sizes = [
        activations(mapping, how)
        for how in (False, "selective", {"mode": "every_nth", "every": 3}, {"mode": "every_nth", "every": 2}, True)
    ]
    assert sizes[0] > sizes[1] > sizes[4]
    assert sizes[0] > sizes[2] > sizes[3] > sizes[4]


def test_offloading_counts_on_a_gpu_only(mapping: dict[str, Any]) -> None:
    offload = {"mode": "full", "offload": True}
    assert activations(mapping, offload) == activations(mapping, True)
    assert activations(mapping, offload, "h100") < activations(mapping, True, "h100")


def test_the_layer_that_is_computed_again_is_counted(mapping: dict[str, Any]) -> None:
    """With checkpointing, one layer's activations exist beside the kept inputs of all."""
    layers = WIDE_LLAMA["num_hidden_layers"]
    inputs = layers * 64 * 64 * 128 * 4
    per_layer = activations(mapping, False) / layers
    assert activations(mapping, True) > inputs + 0.7 * per_layer


def test_an_offloaded_embedding_leaves_the_device(mapping: dict[str, Any]) -> None:
    def weights(offload: bool, device: str) -> int:
        model = {"config": WIDE_LLAMA, "freeze": "embeddings", "offload_embeddings": offload}
        return steep.plan({**mapping, "model": model}, device=device).structure.memory.weights

    table = WIDE_LLAMA["vocab_size"] * 128 * 4
    assert weights(False, "h100") - weights(True, "h100") == table
    assert weights(True, "cpu") == weights(False, "cpu")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "the embedding is trained"),
        ({"config": {**WIDE_LLAMA, "tie_word_embeddings": True}}, "also its output head"),
    ],
)
def test_an_embedding_that_cannot_leave_is_refused(mapping: dict[str, Any], changes: Any, problem: str) -> None:
    mapping["model"] |= {"offload_embeddings": True, **changes}
    with pytest.raises(ConfigError, match=problem):
        steep.plan(mapping, device="h100")


def test_fit_lists_what_fits_fastest_first(mapping: dict[str, Any]) -> None:
    whole = steep.plan(mapping, device="h100").peak_bytes
    found = steep.plan_fit(mapping, int(whole * 0.8), device="h100")
    assert found.proposals
    assert [p.work_ratio for p in found.proposals] == sorted(p.work_ratio for p in found.proposals)
    for proposal in found.proposals:
        assert proposal.peak_bytes <= found.limit_bytes
        changed = {**mapping, "train": {**mapping["train"]}}
        for key, value in proposal.changes.items():
            section, name = key.split(".")
            changed[section] = {**changed[section], name: value}
        assert (
            steep.plan(changed, device="h100").peak_bytes == proposal.peak_bytes
        )  # what is proposed is what is planned


def test_fit_of_what_fits_already_changes_nothing(mapping: dict[str, Any]) -> None:
    first = steep.plan_fit(mapping, "1GiB", device="h100").proposals[0]
    assert (first.changes, first.work_ratio) == ({}, 1.0)


def test_fit_changes_the_result_only_where_nothing_else_fits(mapping: dict[str, Any]) -> None:
    tight = {**mapping, "train": {**mapping["train"], "micro_batch_size": 1, "activation_checkpointing": True}}
    least = steep.plan(tight, device="h100").peak_bytes
    optimizer = steep.plan(tight, device="h100").structure.memory.optimizer
    found = steep.plan_fit(mapping, int(least - optimizer / 2), device="h100")
    assert found.proposals
    assert all(p.changes_result and p.changes["optimizer.name"] == "adamw_8bit" for p in found.proposals)
    assert "changes the result" in found.to_text()


def test_what_cannot_fit_says_what_is_least(mapping: dict[str, Any]) -> None:
    found = steep.plan_fit(mapping, "1MiB", device="h100")
    assert not found.proposals
    assert "nothing that steep can set" in found.to_text()
    assert found.smallest.peak_bytes > found.limit_bytes
    with pytest.raises(ConfigError, match="fit: "):
        steep.plan_fit(mapping, "large")
