"""Your own model, built for `_target_: ./my_model.py:build`.

steep needs a `torch.nn.Module` whose forward takes `input_ids` (and `position_ids`, if it has positions) and returns
logits (B, T, V). A transformers model, as here, also gets document attention, the chunked loss, a checkpoint that
`from_pretrained` loads, generation and export.
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def build(vocab_size: int, width: int = 96, layers: int = 4, heads: int = 4, positions: int = 256) -> nn.Module:
    """A narrow Llama whose feed-forward is twice the width, with tied embeddings and fresh weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)
