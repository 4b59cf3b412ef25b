"""Facts about a model that the rest of steep asks for."""

from __future__ import annotations

from torch import nn

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def has_adapter(model: nn.Module) -> bool:
    """Whether peft has put an adapter into the model."""
    return hasattr(model, "peft_config")


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
