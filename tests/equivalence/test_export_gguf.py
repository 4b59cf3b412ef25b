"""A .gguf file is the model that was trained: read back by transformers' own reader, and by llama.cpp where it is there.

llama.cpp comes from llama-cpp-python in an environment of its own, which `make llama-env` builds; its interpreter is named by
STEEP_LLAMA_CPP_PYTHON.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steep
from steep.core.errors import ConfigError, ModelError
from steep.exporters.format import Options
from steep.exporters.formats import gguf
from steep.exporters.gguf_tokenizer import say_differences
from steep.exporters.run import ask_trained, open_task
from steep.models.config import ModelConfig
from steep.models.load import load_model

pytest.importorskip("gguf", reason="the extra gguf is not installed")

LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
          "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LAYERS, "tie_word_embeddings": True},
    "llama, untied, llama3 rope": {
        **LAYERS, "tie_word_embeddings": False, "model_type": "llama",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    },
    "llama, yarn rope": {
        **LAYERS, "model_type": "llama",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "mistral": {**LAYERS, "sliding_window": None},
    "qwen2": {**LAYERS},
    "qwen3": {**LAYERS, "head_dim": 32},
    "gemma2": {**LAYERS, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": {**LAYERS, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "mixtral": {**LAYERS, "num_local_experts": 4},
    "smollm3": {**LAYERS, "num_hidden_layers": 4, "pad_token_id": 0},
    "granite": {**LAYERS, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "logits_scaling": 2.0, "tie_word_embeddings": True},
    "qwen2_moe": {**LAYERS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {**LAYERS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32,
                  "norm_topk_prob": True},
    "gemma": {**LAYERS, "head_dim": 32},
    "phi3": {**LAYERS, "pad_token_id": 0, "sliding_window": 400},
    "phi3, longrope": {
        **LAYERS, "model_type": "phi3", "pad_token_id": 0, "max_position_embeddings": 1024,
        "original_max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 10 for i in range(4)],
                            "long_factor": [2.0 + i for i in range(4)], "partial_rotary_factor": 0.5,
                            "original_max_position_embeddings": 512},
    },
    "olmo2": {**LAYERS, "tie_word_embeddings": False},
    "olmo2, tied": {**LAYERS, "model_type": "olmo2", "tie_word_embeddings": True},
    "exaone4": {**LAYERS, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "exaone4, llama3 rope": {
        **LAYERS, "model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    },
    "glm4": {**LAYERS, "head_dim": 16, "pad_token_id": 0},
    "starcoder2": {**LAYERS},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 512},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path) -> dict[str, Path]:
    """One small random model of each family, with a tokenizer."""
    import torch
    from transformers import AutoTokenizer

    folders = {}
    for name, sizes in FAMILIES.items():
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_").replace(",", ""))
        model: Any = load_model(ModelConfig(config={"model_type": name, **sizes, "eos_token_id": 0, "bos_token_id": 0}))
        with torch.no_grad():
            torch.manual_seed(0)
            for parameter in model.parameters():  # norms too: those that are all ones hide a missing + 1
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folders[name])
    return folders


ALIKE = ("llama, yarn rope", "mistral", "qwen2", "gemma2", "qwen2_moe", "phi3", "phi3, longrope", "starcoder2")
"""Written by the same code as another family here; tested in make test-all."""
BY_LLAMA_CPP_ALONE = (
    "mixtral",
    "smollm3",
    "granite",
    "gemma",
    "olmo2",
    "olmo2, tied",
    "exaone4",
    "exaone4, llama3 rope",
    "glm4",
)
"""Families that transformers' reader of .gguf files does not know."""
MARKED = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else [])
    for name in FAMILIES
    if name not in BY_LLAMA_CPP_ALONE
]


@pytest.mark.parametrize("name", MARKED)
def test_transformers_reads_the_trained_model_from_the_file(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    result = steep.export(models[name], to="gguf", dtype="f32", out=tmp_path / "out")
    reader = result.parities[0]
    assert "its reader of .gguf files" in reader.program
    assert reader.logits_ratio < 1e-4
    assert reader.greedy_tokens_equal == reader.greedy_tokens == 32


@pytest.mark.parametrize(
    ("dtype", "kl"),
    [
        pytest.param("bf16", 1e-3, marks=pytest.mark.slow),
        pytest.param("f16", 1e-5, marks=pytest.mark.slow),
        ("q8_0", 1e-3),
    ],
)
def test_the_rounding_of_a_dtype_is_told(
    models: dict[str, Path], dtype: str, kl: float, corpus_directory: Path, tmp_path: Path
) -> None:
    result = steep.export(models["llama"], to="gguf", dtype=dtype, out=tmp_path / "out")
    assert 0 < result.parities[0].kl_nats < kl
    assert result.parities[0].logits_ratio < 1e-4  # against the same rounding
    file = next((tmp_path / "out").glob("*.gguf"))
    texts = {"page": str(min(corpus_directory.glob("*.txt")))}
    scores = [
        steep.evaluate(reference, texts, tokens=400, precision="fp32").scores[0]
        for reference in (file, models["llama"])
    ]
    assert scores[0].nats_per_token == pytest.approx(scores[1].nats_per_token, abs=0.02)
    assert steep.generate(tmp_path / "out", "The with", max_new_tokens=4, precision="fp32")


def corrupted(task: Any, folder: Path, expected: Any, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write again with `change` done to the converter's description of the family, and verify against the first answers."""
    from steep.exporters import gguf_families

    monkeypatch.setitem(gguf_families.FAMILIES, task.model.config.model_type, change)
    gguf.write(task, folder)
    with pytest.raises(ModelError, match="is not the trained model"):
        gguf.verify(task, folder, expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"interleaves_rotation": False}),
        pytest.param("gemma3_text", {"norm_offset": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_a_wrong_conversion_is_refused(
    models: dict[str, Path], name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from steep.exporters.gguf_families import FAMILIES as known

    with open_task(str(models[name]), "gguf", Options(dtype="f32")) as (_, task):
        ask_trained(task)
        expected = gguf.write(task, tmp_path / "right")
        gguf.verify(task, tmp_path / "right", expected)
        corrupted(task, tmp_path / "wrong", expected, replace(known[name], **changes), monkeypatch)


def test_a_family_that_only_llama_cpp_reads_is_refused_without_it(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEEP_LLAMA_CPP_PYTHON", raising=False)
    monkeypatch.setattr(gguf, "llama_cpp_python", lambda given: given)
    for name in BY_LLAMA_CPP_ALONE:
        with pytest.raises(ConfigError, match="verified only by llama.cpp, which was not found: pip install"):
            steep.export(models[name], to="gguf", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "other layers than every fourth"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, and llama.cpp takes True"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "some of its layers have no experts"),
        ("exaone4", {"sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, "only with 64 layers"),
        ("phi3", {"num_attention_heads": 2, "head_dim": 16}, "heads of 16 are not"),
        ("olmo2", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(name: str, changes: dict[str, Any], problem: str) -> None:
    from transformers import AutoConfig

    from steep.exporters.gguf_families import family_of

    config = AutoConfig.for_model(name, **{**FAMILIES[name], **changes})
    with pytest.raises(ModelError, match=problem):
        family_of(config)


def test_a_window_that_llama_cpp_lacks_bounds_the_context_and_a_name_cannot_hinder_loading() -> None:
    from transformers import AutoConfig

    from steep.exporters.gguf_families import context_length, family_of

    for name, window, tokens in [
        ("phi3", 400, 400),
        ("mistral", 100, 100),
        ("mistral", None, 512),
        ("gemma2", 64, 512),
    ]:
        config = AutoConfig.for_model(name, **{**FAMILIES[name], "sliding_window": window})
        assert context_length(config, family_of(config)) == tokens
    assert gguf.general_name("my-Phi3", ["<s>"]) == "my-phi 3"
    assert gguf.general_name("phi-3", ["<s>", "</s>", "<unk>", "<|endoftext|>"]) == "phi-3"


def test_a_token_that_begins_with_a_space_is_said_to_need_llama_cpp(tiny_tokenizer_directory: Path) -> None:
    """transformers' reader does not find it, so that the export is refused where only transformers can read the file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_directory)
    tokenizer.add_tokens(["statement"])
    said: list[str] = []
    say_differences(tokenizer, said.append)
    assert said == []
    tokenizer.add_tokens([" expression"])
    say_differences(tokenizer, said.append)
    [remark] = said
    assert "does not find added tokens that begin with a space (' expression')" in remark


def test_a_flipped_weight_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with open_task(str(models["qwen2"]), "gguf", Options(dtype="f32")) as (_, task):
        ask_trained(task)
        expected = gguf.write(task, tmp_path / "out")
        [file] = (tmp_path / "out").glob("*.gguf")
        data = np.memmap(file, dtype=np.float32, mode="r+", offset=file.stat().st_size % 4)
        data[-2000:] *= -1
        data.flush()
        with pytest.raises(ModelError, match="is not the trained model"):
            gguf.verify(task, tmp_path / "out", expected)


def test_ollama_gets_a_modelfile_that_names_the_file_and_the_end(models: dict[str, Path], tmp_path: Path) -> None:
    steep.export(models["llama"], to="ollama", dtype="q8_0", out=tmp_path / "out")
    text = (tmp_path / "out" / "Modelfile").read_text()
    [file] = (tmp_path / "out").glob("*.gguf")
    assert f"FROM ./{file.name}" in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert "TEMPLATE" in text


def test_what_cannot_be_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="q8_0"):
        steep.export(models["llama"], to="gguf", dtype="q4_k", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="has no --quantize"):
        steep.export(models["llama"], to="gguf", quantize="nf4", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="give a folder"):
        steep.export(models["llama"], to="gguf", out=tmp_path / "out.gguf")
    with pytest.raises(ConfigError, match="there is no such program"):
        steep.export(models["llama"], to="gguf", out=tmp_path / "out", verify_with="no-such-python")
    bloom = load_model(
        ModelConfig(config={"model_type": "bloom", "vocab_size": 512, "hidden_size": 32, "n_layer": 1, "n_head": 2})
    )
    bloom.save_pretrained(tmp_path / "bloom")  # type: ignore[operator]
    for file in models["llama"].glob("tokenizer*"):
        (tmp_path / "bloom" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="no gguf file of bloom"):
        steep.export(tmp_path / "bloom", to="gguf", out=tmp_path / "out")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantized_folder_is_verified_evaluated_and_not_trained(
    models: dict[str, Path], method: str, corpus_directory: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    result = steep.export(models["llama"], to="hf", quantize=method, dtype="f32", out=tmp_path / "out")
    assert result.dtype == method
    assert 0 < result.parities[0].kl_nats < 0.5
    texts = {"page": str(min(corpus_directory.glob("*.txt")))}
    assert steep.evaluate(tmp_path / "out", texts, tokens=400, precision="fp32").scores[0].nats_per_token > 0
    assert steep.generate(tmp_path / "out", "The with", max_new_tokens=4, precision="fp32")
    with pytest.raises(ModelError, match="training needs the unquantized weights"):
        load_model(ModelConfig(pretrained=str(tmp_path / "out")))


@pytest.mark.skipif(
    "STEEP_LLAMA_CPP_PYTHON" not in os.environ,
    reason="llama.cpp is built from source, which takes a quarter of an hour: make llama-env, and set STEEP_LLAMA_CPP_PYTHON",
)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_reads_the_trained_model_from_the_file(
    models: dict[str, Path], name: str, dtype: str, tmp_path: Path
) -> None:
    result = steep.export(models[name], to="gguf", dtype=dtype, out=tmp_path / "out")
    assert "llama" in result.verified_with
    print(name, dtype, result.parities[-1])
