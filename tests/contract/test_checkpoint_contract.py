"""What is saved is what transformers loads: model/consolidated of a real checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from steep.checkpoint.consolidate import huggingface_files
from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import open_checkpoint
from steep.checkpoint.pieces import capture_rng, take_pieces
from steep.checkpoint.save import CheckpointWriter

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(tied: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)  # .to(bfloat16) would round the rotary frequencies


MODELS = {
    "llama_tied": lambda: llama(True),
    "llama_untied": lambda: llama(False),
    "llama_bf16": lambda: llama(False, torch.bfloat16),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_consolidated_folder(tmp_path, tiny_tokenizer_directory, name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_directory)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.tensor([tokenizer("def main(): return 1")["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state = CheckpointState(
        **vars(take_pieces(model, optimizer)), rng=capture_rng(), config_yaml="", step=1, tokens=1, sequences_seen=1,
        plan_fingerprint="", hf_files=huggingface_files(model, tokenizer),
    )  # fmt: skip
    with CheckpointWriter(tmp_path) as writer:
        writer.save("epoch_0_step_1", state)

    folder = tmp_path / "epoch_0_step_1" / "model" / "consolidated"
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == model.dtype
    saved, now = model.state_dict(), loaded.state_dict()
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[key], now[key]) for key in saved)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(folder)("for x in y:")["input_ids"] == tokenizer("for x in y:")["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert not [key for key in config if key.startswith("_") or key == "auto_map"]
    assert open_checkpoint(tmp_path / "epoch_0_step_1").model_tensors().keys() <= saved.keys()
