"""Which matrices of a model an adapter or a quantization leaves out. In: a model. Out: their names and their share, for a line.

Both work on linear layers; the experts and routers of a mixture are tensors of their own, which can be most of the model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from steep.models.layers import count_parameters, parameter_numbers, plain_name


def left_out(model: nn.Module, covered: Callable[[str, Tensor], bool]) -> str:
    """`mlp.experts.gate_up_proj, mlp.gate.weight (61% of the parameters)`; empty where nothing of two dimensions or more is left.

    covered: whether a parameter, by its full name, needs no mention.
    """
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not covered(name, parameter):
            kind = _in_layer(plain_name(name))
            sizes[kind] = sizes.get(kind, 0) + parameter_numbers(parameter)
    if not sizes:
        return ""
    names = sorted(sizes, key=lambda name: -sizes[name])
    share = sum(sizes.values()) / count_parameters(model)
    return f"{', '.join(names)} ({100 * share:.2g}% of the parameters)"


def _in_layer(name: str) -> str:
    """The part of a name after the number of its layer: model.layers.0.mlp.gate.weight -> mlp.gate.weight."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
