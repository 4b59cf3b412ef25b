"""A module whose weights have a shape and no data, whatever its constructor does with them.

In: a function that builds the module. Out: the module on fake tensors. Main choice: while it is built, small tensors are real, so
that sizes, rates and bounds that a constructor computes and reads are right, and only what has the size of weights is fake; a
question to weights (is any of them out of bounds? as a truncated normal asks) is answered with no. A constructor that reads
numbers from its weights is run for real, once, and the data thrown away. Weakness: that one needs the memory of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# torch's own module for shapes without data is private
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steep.core.errors import ConfigError
from steep.core.say import Say

SMALL_NUMEL = 4096
"""Elements of the largest tensor that is real while a module is built."""


def build_shapes(build: Callable[[], nn.Module], fake: FakeTensorMode, say: Say) -> nn.Module:
    """The module that `build` returns, its parameters and buffers without data. `fake` must not be active."""
    try:
        with _SmallTensorsReal(fake):
            module = build()
    except (DataDependentOutputException, ConfigError) as error:
        if not isinstance(error, DataDependentOutputException) and not isinstance(
            error.__cause__, DataDependentOutputException
        ):
            raise
        module = build()
        say("built in full for the plan: its constructor reads numbers from its weights")
    return _without_data(module, fake)


class _SmallTensorsReal(TorchDispatchMode):
    """Operations on fake tensors, and those whose results are large, are fake; all others happen."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        has_fake = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if has_fake and func is torch.ops.aten._local_scalar_dense.default and inputs[0].dtype is torch.bool:
            return False
        if has_fake or not _all_small(inputs):
            with self.fake:
                return func(*args, **kwargs)
        if not inputs:  # a new tensor: its size is asked first
            with self.fake:
                made = func(*args, **kwargs)
            if not _all_small([leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]):
                return made
        return func(*args, **kwargs)


def _all_small(tensors: list[Tensor]) -> bool:
    return all(tensor.numel() <= SMALL_NUMEL for tensor in tensors)


def _without_data(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """The module with fake parameters and buffers; tensors that were one stay one."""
    made: dict[int, Tensor] = {}

    def faked(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made:
            with fake:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    held[name] = faked(tensor)  # type: ignore[assignment]
    return module
