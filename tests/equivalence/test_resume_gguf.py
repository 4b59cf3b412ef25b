"""A run that began from a .gguf: what its checkpoints say about the weights is what they are, so that it can go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steep.checkpoint.consolidate import huggingface_files
from steep.models.config import ModelConfig
from steep.models.load import load_model
from support import LLAMA


@pytest.fixture
def model_as_from_gguf() -> torch.nn.Module:
    """A model with the marks that transformers 5 leaves on one it has dequantized."""
    model = load_model(ModelConfig(config=LLAMA), seed=1)
    model.config._model_name_or_path = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    return model


def test_a_checkpoint_of_a_gguf_run_loads_again(model_as_from_gguf: torch.nn.Module, tmp_path: Path) -> None:
    for name, content in huggingface_files(model_as_from_gguf).items():
        (tmp_path / name).write_bytes(content)
    state = {name: parameter.detach() for name, parameter in model_as_from_gguf.named_parameters()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = dict(load_model(ModelConfig(pretrained=str(tmp_path)), seed=2).named_parameters())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_model_from_gguf_can_be_saved_and_read_again(model_as_from_gguf: torch.nn.Module, tmp_path: Path) -> None:
    """transformers takes it for a quantized model, which it does not save, although the weights were dequantized."""
    from steep.models.load import _forget_gguf

    model_as_from_gguf.hf_quantizer = object()
    _forget_gguf(model_as_from_gguf).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(pretrained=str(tmp_path)))
    for (name, left), (_, right) in zip(loaded.named_parameters(), model_as_from_gguf.named_parameters(), strict=True):
        assert torch.equal(left, right), name
