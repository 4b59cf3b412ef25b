"""Arithmetic of a model: operations per token.

In: sizes or a loaded model. Out: FLOPs per token by the convention of PaLM and nanoGPT: 6 per parameter that takes part
in a matrix product (2 forward, 4 backward; a tied head counts once, embeddings that are only looked up not at all),
plus 12 * layers * attention width * sequence length for full attention. A frozen matrix has no gradient of its own and counts
4; one before everything that is trained has no backward pass and counts 2. Attention always counts in full. Weakness: causal
attention and short documents do half of the second term or less. Of a mixture of experts, those that a token uses count.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from steep.models.layers import layer_settings, output_layer, parameter_numbers, text_config, text_part
from steep.models.mixture import find_experts, unused_ratios


def flops_per_token(matmul_parameters: int, num_layers: int, attention_width: int, sequence_length: int) -> int:
    """FLOPs of one token's forward and backward pass.

    attention_width: heads * head size (the hidden size in most models). GPT-2 124M at 1,024 tokens: 0.855e9.
    """
    return 6 * matmul_parameters + 12 * num_layers * attention_width * sequence_length


def model_flops_per_token(model: nn.Module, sequence_length: int) -> int | None:
    """FLOPs per token of a loaded model (on any device, meta included); None without a config that gives its sizes."""
    text = text_config(model)
    widths = [_attention_width(settings) for settings in layer_settings(text)]
    if not widths or None in widths:
        return None
    total = sum(width for width in widths if width is not None)
    all_trained = flops_per_token(count_matmul_parameters(model), 1, total, sequence_length)
    return all_trained - flops_saved_by_freezing(model)


def _attention_width(settings: Any) -> int | None:
    """N * H of a layer, else its width; None where its configuration says neither."""
    heads, head_size = getattr(settings, "num_attention_heads", None), getattr(settings, "head_dim", None)
    if isinstance(heads, int) and isinstance(head_size, int):
        return heads * head_size
    width = getattr(settings, "hidden_size", None)
    return width if isinstance(width, int) else None


def count_matmul_parameters(model: nn.Module) -> int:
    """Parameters that multiply the activations of a token: those of two or more dimensions, without embeddings that are only
    looked up and the experts that the token is not sent to."""
    unused = unused_ratios(model)
    return round(sum(_used_numbers(parameter, unused) for parameter in _matmul_parameters(model)))


def _used_numbers(parameter: Any, unused: dict[int, float]) -> float:
    """Weights of a parameter that a token uses; all but those of experts."""
    return parameter_numbers(parameter) * (1 - unused.get(id(parameter), 0.0))


def flops_saved_by_freezing(model: nn.Module) -> int:
    """FLOPs per token that a training step does not do because parameters are frozen.

    Assumes that parameters are used in the order in which the model lists them, except a tied head.
    """
    order = list(model.parameters())
    first = next((number for number, parameter in enumerate(order) if parameter.requires_grad), len(order))
    before = {id(parameter) for parameter in order[:first]} - {id(getattr(output_layer(model), "weight", None))}
    frozen = [parameter for parameter in _matmul_parameters(model) if not parameter.requires_grad]
    unused = unused_ratios(model)
    return round(sum(_used_numbers(parameter, unused) * (4 if id(parameter) in before else 2) for parameter in frozen))


def _matmul_parameters(model: nn.Module) -> list[Any]:
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up.discard(id(getattr(output_layer(model), "weight", None)))  # a tied head multiplies by the embedding
    biases = {id(tensor) for experts in find_experts(model) for tensor in experts.biases()}
    parts = (text_part(model), output_layer(model) or model)
    read = {
        id(parameter) for part in parts for parameter in part.parameters()
    }  # text runs no tower of a composite model
    skipped = looked_up | biases | {id(parameter) for parameter in model.parameters() if id(parameter) not in read}
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2 and id(parameter) not in skipped]
