"""What the loss of a model reaches: which parameters get a gradient, and which layers are called at all.

In: a model. Out: parameters that are frozen because no gradient can come to them, each said. Some families of transformers hold
such tensors by design: biases that balance experts by their own rule, the indexers of sparse attention, which need a loss of
their own, the cross-attention of a decoder without its encoder. In a model of one's own they are a mistake, and the check of the
first updates stops the run. Weakness: a part that only texts longer than the run's sequences use counts as not reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steep.core.say import Say
from steep.core.units import counted, format_count, listing
from steep.models import layers
from steep.models.lm_loss import LMLoss, read_head
from steep.models.probes import one_document


def freeze_unreached(lm_loss: LMLoss, sequence_length: int, say: Say, vocab_size: int | None = None) -> None:
    """Freeze the trainable parameters of a model of transformers to which no gradient can come, and say which.

    Looks at autograd's graph of one forward pass over `sequence_length` tokens; no backward pass is run. The parameters of single
    experts are left alone: which of them a token reaches is the router's choice.
    """
    model = lm_loss.model
    if not type(model).__module__.startswith("transformers."):
        return
    document = one_document(model, sequence_length, vocab_size)
    with layers.evaluating(model), torch.enable_grad():
        if lm_loss.has_head:  # whole logits may need more memory than a training step, which makes them in chunks
            head = read_head(model)
            reached = {head.weight, head.bias, *_leaves(lm_loss.hidden_states(document))}
        else:
            reached = {*_leaves(lm_loss.own_logits(document))}
    waiting = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in reached and "experts" not in name.split(".")
    }
    if not waiting or not any(parameter in reached for parameter in model.parameters()):
        return
    for parameter in waiting.values():
        parameter.requires_grad_(False)
    size = format_count(sum(parameter.numel() for parameter in waiting.values()))
    say(
        f"not trained: {counted(len(waiting), 'tensor')} ({size} parameters) that the loss of {type(model).__name__} does not "
        f"reach: {listing(list(waiting))}"
    )


def _leaves(output: Tensor) -> set[Tensor]:
    """The leaf tensors of the graph behind `output`."""
    found: set[Tensor] = set()
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


def not_plain(model: nn.Module, names: set[str]) -> set[str]:
    """Which of these linear layers are not used as such in a forward pass: families read the weights of some directly (Mamba's
    dt_proj), so that what is put around them has no effect, and some return more than their product (Llama 4's routers)."""
    plain: set[str] = set()

    def see(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: plain.add(name) if isinstance(output, Tensor) else None

    handles = [model.get_submodule(name).register_forward_hook(see(name)) for name in names]
    ids = torch.zeros(1, 8, dtype=torch.long, device=layers.compute_device(model))
    try:
        with layers.evaluating(model):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name in names - plain if "experts" not in name.split(".")}
