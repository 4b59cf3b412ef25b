"""Generated text against transformers' own generate, and streaming against the finished text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import steep
from steep.core.errors import ModelError
from steep.core.say import tell
from steep.evaluation.generate import TextStream, generate_text
from steep.evaluation.loaded_model import open_model
from steep.evaluation.model_reference import model_reference
from steep.models.attention_choice import prepare_lm_loss
from steep.models.config import ModelConfig
from steep.models.gpt2 import build_gpt2_model
from steep.models.load import load_model
from steep.runtime.device import available_cores, default_threads
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import load_tokenizer
from support import LLAMA


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path):
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


def test_greedy_text_equals_transformers_generate(tokenizer) -> None:
    model = load_model(ModelConfig(config={**LLAMA, "eos_token_id": 0}), seed=1).eval()
    prompt = "The with statement"
    ids = torch.tensor([tokenizer.encode(prompt)])
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=0, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    prepare_lm_loss(model, tell)  # the training attention must not change what is generated
    pieces: list[str] = []
    text = generate_text(model, tokenizer, prompt, max_new_tokens=24, emit=pieces.append)
    assert text == tokenizer.decode([i for i in expected.tolist() if i != 0])
    assert "".join(pieces) == text


def test_sampling_is_repeatable_by_seed(tokenizer) -> None:
    model = load_model(ModelConfig(config=LLAMA), seed=1).eval()
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate_text(model, tokenizer, "a", max_new_tokens=16, do_sample=True, temperature=1.0))
    assert texts[0] == texts[1] != texts[2]


def test_a_model_without_generate_is_continued_the_same_way(tokenizer) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = build_gpt2_model(vocab_size=512, n_positions=32, n_embd=32, n_layer=2, n_head=4, seed=4).eval()
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.generation_config.eos_token_id = 0
    assert generate_text(ours, tokenizer, "The with", max_new_tokens=12) == generate_text(
        theirs, tokenizer, "The with", max_new_tokens=12
    )


def test_generation_stops_at_the_end_of_text_and_leaves_the_mode(tokenizer) -> None:
    model = load_model(ModelConfig(config=LLAMA), seed=1).train()
    with torch.no_grad():  # the head predicts end of text whatever came before
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    assert generate_text(model, tokenizer, "a", max_new_tokens=8) == ""
    assert model.training


def test_empty_prompts_start_from_the_end_of_text(tokenizer) -> None:
    model = load_model(ModelConfig(config=LLAMA), seed=1)
    assert generate_text(model, tokenizer, "", max_new_tokens=4)


def test_a_character_is_held_back_until_its_bytes_are_there() -> None:
    data = "aé😀b".encode()
    shown: list[str] = []
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"), shown.append)
    for byte in data:
        stream.add([byte])
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    stream.end()
    assert "".join(shown) == "aé😀b"


def test_looking_at_a_model_leaves_the_threads_of_the_process(
    tiny_tokenizer_directory: Path, corpus_directory: Path, tmp_path: Path
) -> None:
    model = load_model(ModelConfig(config={**LLAMA, "eos_token_id": 0}), seed=1)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    for file in tiny_tokenizer_directory.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    before = torch.get_num_threads()
    other = available_cores() + 1  # what the model is run with is another number
    torch.set_num_threads(other)
    try:
        steep.generate(tmp_path / "model", "The with", max_new_tokens=2, precision="fp32")
        assert torch.get_num_threads() == other
        steep.evaluate(tmp_path / "model", {"page": str(min(corpus_directory.glob("*.txt")))}, tokens=100)
        assert torch.get_num_threads() == other
        with open_model(model_reference(tmp_path / "model")):
            assert torch.get_num_threads() == default_threads()
        with pytest.raises(ModelError):
            steep.generate(tmp_path / "model", "word " * 5000, precision="fp32")
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(before)
