"""Bytes of the weights of a 4-bit base with an adapter, against the same base in bf16.

    python benchmarks/quantized_weights.py [--shapes smollm2 tinyllama]

Shapes from transformers' configurations with random weights: SmolLM2-135M (a fifth of it an embedding that is tied to the output
head) and TinyLlama-1.1B (untied, an eighth). Counted is every tensor that the model holds, scales and tables of the quantized
layers included. Embedding and head stay in bf16, as bitsandbytes leaves them; the adapter (r=16 on all linear layers) is fp32.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import heading, table

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tinyllama": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    print(heading())
    rows = [row for name in parser.parse_args().shapes for row in measure(name)]
    print("\n" + table(["shape", "weights", "MB", "x"], rows))


def measure(name: str) -> list[list[str]]:
    """Rows of one shape."""
    import torch

    from steep.models.adapters import add_adapter
    from steep.models.config import AdapterConfig
    from steep.models.fresh import build_fresh
    from steep.models.load import cast_weights
    from steep.models.quantize import quantize

    model = cast_weights(build_fresh(SHAPES[name], None, seed=0), torch.bfloat16)
    sizes = {"bf16": held_bytes(model)}
    quantize(model, "nf4", torch.bfloat16, "cpu")
    sizes["nf4, double quantization"] = held_bytes(model)
    add_adapter(model, AdapterConfig(rank=16), lambda line: None, base=None, seed=0)
    sizes["the same with an adapter of rank 16"] = held_bytes(model)
    return [[name, what, f"{size / 1e6:,.0f}", f"{size / sizes['bf16']:.2f}"] for what, size in sizes.items()]


def held_bytes(model: Any) -> int:
    """Of all parameters and buffers, tied ones once, and of the scales and tables of 4-bit weights, which are neither."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            found = (getattr(part, name, None) for name in ("absmax", "code"))
            tensors.update({id(tensor): tensor for tensor in found if tensor is not None})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


if __name__ == "__main__":
    main()
