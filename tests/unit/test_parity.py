"""The questions to an exported model: any causal model answers them, with a key-value cache or without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from steep.exporters.parity import Questions, answer
from steep.models.config import ModelConfig
from steep.models.load import load_model
from support import LLAMA

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mamba": {**SIZES, "state_size": 8, "intermediate_size": 64},
    "mamba2": {**SIZES, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {**SIZES, "attention_hidden_size": 32, "context_length": 64},
    "recurrent_gemma": {
        **SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64,
    },
    "openai-gpt": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2},
}  # fmt: skip


class Plain(nn.Module):
    """A model of one's own: other argument names, logits as a tuple, no cache."""

    def __init__(self, returns: str):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.head, self.returns = nn.Embedding(97, 8), nn.Linear(8, 97), returns

    def forward(self, input_ids: torch.Tensor) -> Any:
        logits = self.head(self.table(input_ids).cumsum(1))
        return {"tuple": (logits, None), "tensor": logits, "named": SimpleNamespace(logits=logits)}[self.returns]


def expected(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The greedy continuation with all tokens read again each time."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            out = model(torch.tensor([ids]))
            logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", [*MODELS, "tuple", "tensor", "named"])
def test_any_model_continues_greedily(name: str) -> None:
    if name in MODELS:
        model: Any = load_model(ModelConfig(config={"model_type": name, **MODELS[name]}), seed=3).eval()
    else:
        model = Plain(name)
    questions = Questions({"text": [5, 1, 8, 2]}, [3, 9, 4], 6)
    found = answer(model, questions)
    assert found.greedy == expected(model, questions.prompt, 6)
    assert found.logits["text"].shape == (4, model.get_input_embeddings().weight.shape[0] if name in MODELS else 97)
    assert found.greedy_logits_TV is not None
    assert found.greedy_logits_TV.argmax(-1).tolist() == found.greedy
