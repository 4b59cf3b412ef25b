"""Facts about a model that the rest of steep asks for: its layers, ends, sizes and device. In: a model, of transformers or not.

Answers come from what a model offers and from the identity of its tensors, never from a family's name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steep.core.errors import ModelError

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put into a parameter's name."""


def text_config(model_or_config: Any) -> Any:
    """The configuration of the part that reads tokens, for a model that also sees or hears. None if the model has none."""
    is_model = isinstance(model_or_config, nn.Module)
    config: Any = getattr(model_or_config, "config", None) if is_model else model_or_config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def text_part(model: nn.Module) -> nn.Module:
    """The part that reads tokens: the language model of a model that also sees or hears, else the model itself."""
    config: Any = getattr(model, "config", None)
    if config is None or text_config(config) is config or not hasattr(model, "get_decoder"):
        return model
    part: Any = model.get_decoder()  # type: ignore[operator]
    return part if isinstance(part, nn.Module) else model


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of transformer blocks: its nn.ModuleList that holds the most parameters. Raises ModelError."""
    lists = [module for module in text_part(model).modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no nn.ModuleList of layers to work on one by one")
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def layer_settings(text: Any) -> list[Any]:
    """The configuration of each layer: its own where layers differ in size (Gemma 4), else the model's. Empty without one."""
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int):
        return []
    own = getattr(text, "per_layer_config", None)
    return list(own) if own else [text] * count


STATE_LAYERS = {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "mamba2", "recurrent", "rwkv"}
"""Kinds of layers, as transformers' configurations name them, that pass something from token to token beside attention."""


def state_carried(model: nn.Module) -> str | None:
    """What in a model carries state from token to token, so that the end of one document reaches the next; None for one that only
    attends. From what the model declares and is made of, not from what its weights compute."""
    text = text_config(model)
    lists = (getattr(text, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    kinds = {str(kind) for kind in itertools.chain.from_iterable(found or () for found in lists)} & STATE_LAYERS
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}"
    if getattr(model, "_is_stateful", False):
        return "transformers marks it as stateful"
    for name, module in text_part(model).named_modules():
        if isinstance(module, nn.RNNBase):
            return f"{name} is recurrent"
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
            return f"{name} is a convolution over tokens"
    return None


def compute_device(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its first parameter that is not in host memory, else the CPU."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def has_no_data(model: nn.Module) -> bool:
    """Whether the model is one of a plan: shapes on fake tensors or on the meta device, which not every model can run on."""
    # torch's own module for shapes without data is private
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(parameter, FakeTensor) or parameter.is_meta for parameter in model.parameters())


def has_adapter(model: nn.Module) -> bool:
    """Whether peft has put an adapter into the model."""
    return hasattr(model, "peft_config")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# ---- the two ends ----


def input_layer(model: Any) -> Any:
    """The token embedding that the model names; None if it names none."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def output_layer(model: Any) -> Any:
    """The output head that the model names; None if it names none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def head_weight(model: nn.Module) -> Tensor | None:
    """(V, D): the weight of the output head; None where the model names no plain linear layer."""
    weight = getattr(output_layer(model), "weight", None)
    plain = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    return weight if plain else None


def is_tied(model: nn.Module) -> bool:
    """Whether the output head is an embedding table, one tensor under two names."""
    weight = getattr(output_layer(model), "weight", None)
    return weight is not None and any(weight is table.weight for table in _embeddings(model))


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def padded_tables(model: nn.Module) -> list[nn.Embedding]:
    """The embedding tables with a row for padding, which begins as zero and never has a gradient."""
    return [table for table in _embeddings(model) if table.padding_idx is not None]


# ---- sizes ----


def vocab_size(model: nn.Module) -> int | None:
    """V by the model's configuration, else the rows of its first embedding; None without either."""
    size = getattr(text_config(model), "vocab_size", None)
    return size or next((table.num_embeddings for table in _embeddings(model)), None)


POSITION_KEYS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configurations call the number of positions: most; MPT and DBRX; decoders of speech."""


def max_positions(model_or_config: Any) -> int | None:
    """Tokens of the longest sequence that the model was made for; None if it has no such limit."""
    text = text_config(model_or_config)
    limit = _position_limit(text)
    if limit is None:
        return None
    if isinstance(model_or_config, nn.Module) and (table := padded_positions(model_or_config)) is not None:
        return limit - int(table.padding_idx or 0) - 1
    rope = getattr(text, "rope_parameters", None) or {}
    return round(limit * rope["factor"]) if rope.get("rope_type") == "dynamic" else limit


def _position_limit(text: Any) -> int | None:
    limits = (getattr(text, name, None) for name in POSITION_KEYS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def padded_positions(model: nn.Module) -> nn.Embedding | None:
    """The table of positions that begin after the id of the padding token, as RoBERTa's do; None for any other model."""
    limit, tokens = _position_limit(text_config(model)), input_layer(model)
    return next((t for t in padded_tables(model) if t.num_embeddings == limit and t is not tokens), None)


def check_sequence_length(model_or_config: Any, sequence_length: int) -> None:
    """Raises ModelError if `sequence_length` tokens are more than the model has positions."""
    limit = max_positions(model_or_config)
    if limit is not None and sequence_length > limit:
        raise ModelError(
            f"data.sequence_length={sequence_length:,} is more than the {limit:,} positions of the model; "
            f"at most {limit:,} works, or extend it: model.rope: {{type: yarn, length: {sequence_length}}}"
        )


def parameter_numbers(parameter: Any) -> int:
    """Weights in a parameter: packed 4-bit ones are more than its elements."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(math.prod(shape) if shape is not None else parameter.numel())


def count_parameters(model: nn.Module) -> int:
    """Weights of the model; a tensor that two names share counts once."""
    return sum(parameter_numbers(parameter) for parameter in model.parameters())


def count_trained(model: nn.Module) -> int:
    """Weights that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- its mode ----


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; each module's own mode is restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
