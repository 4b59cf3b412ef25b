"""Which parameters are updated, at which learning rate, and which of them decay.

In: a model and an OptimizerConfig. Out: parameter groups for a torch optimizer, with the parameters' names. Main
choice, as in nanoGPT: every trainable tensor of two or more dimensions decays, embeddings included; norms, biases and other
vectors do not. A tied tensor appears once. Embeddings with their own rate come last: the log shows the first group's rate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from steep.core.errors import ConfigError, ModelError
from steep.core.units import format_count
from steep.models.layers import has_adapter, input_layer, output_layer
from steep.optim.config import OptimizerConfig

EMBEDDING_RATIO_BESIDE_ADAPTERS = 0.1
"""Learning rate of embeddings that are trained beside adapters, divided by the main one. Adapters tolerate higher rates than
whole matrices. Published runs use a tenth (5e-6 beside 5e-5) to a fifth; no ablation has been published."""


def build_param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups `decay`, `no_decay` and, where these have their own rate, `lora_B` and `embeddings`; empty groups are left out.

    Each has name, lr, weight_decay and params: pairs of (name, tensor) in the model's order. Frozen parameters are left out.
    Raises ModelError if nothing is trainable, ConfigError for an embedding rate without trained embeddings.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError("no parameter of the model is trainable: all have requires_grad=False")
    rate = embedding_rate(model, config)
    embeddings = set() if rate is None else embedding_tensors(model)
    others = [(name, parameter) for name, parameter in trainable if parameter not in embeddings]
    ratio = lora_plus_ratio(model)
    faster = [pair for pair in others if ".lora_B." in pair[0]] if ratio is not None else []
    others = [pair for pair in others if ".lora_B." not in pair[0]] if faster else others
    members = {
        "decay": ([pair for pair in others if pair[1].ndim >= 2], config.learning_rate, config.weight_decay),
        "no_decay": ([pair for pair in others if pair[1].ndim < 2], config.learning_rate, 0.0),
        "lora_B": (faster, config.learning_rate * (ratio or 1.0), config.weight_decay),
        "embeddings": ([pair for pair in trainable if pair[1] in embeddings], rate, config.weight_decay),
    }
    if config.embedding_learning_rate is not None and not members["embeddings"][0]:
        raise ConfigError(
            f"optimizer.embedding_learning_rate={config.embedding_learning_rate:g} is given, but no token embedding or output "
            f"head of {type(model).__name__} is trained; remove the key, or do not freeze them"
        )
    return [
        {"name": name, "params": parameters, "lr": lr, "weight_decay": weight_decay}
        for name, (parameters, lr, weight_decay) in members.items()
        if parameters
    ]


def lora_plus_ratio(model: nn.Module) -> float | None:
    """Learning rate of an adapter's B matrices divided by that of its A matrices (LoRA+); None where it is not configured."""
    ratio = getattr(model, "lora_plus_ratio", None)
    return ratio if isinstance(ratio, float) else None


def embedding_rate(model: nn.Module, config: OptimizerConfig) -> float | None:
    """The peak learning rate of the embeddings' own group; None where they use the main one and have no group."""
    if config.embedding_learning_rate is not None:
        return config.embedding_learning_rate
    return EMBEDDING_RATIO_BESIDE_ADAPTERS * config.learning_rate if has_adapter(model) else None


def embedding_tensors(model: Any) -> set[Tensor]:
    """The trained weights of the token embedding and of the output head: one tensor where they are tied.

    Found through the model's get_input_embeddings and get_output_embeddings, so names do not matter; in a module that has
    neither, every torch.nn.Embedding counts.
    """
    layers = [layer for layer in (input_layer(model), output_layer(model)) if layer is not None]
    layers = layers or [module for module in model.modules() if isinstance(module, nn.Embedding)]
    parameters = (parameter for layer in layers for parameter in layer.parameters())
    return {parameter for parameter in parameters if parameter.requires_grad and parameter.ndim >= 2}


def describe_group(group: dict[str, Any]) -> str:
    """One line of the table of parameter groups, of a group from `build_param_groups` or from an optimizer."""
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    parameters = format_count(sum(tensor.numel() for tensor in tensors))
    dtypes = ", ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
    return (
        f"{group['name']:<10} {len(tensors):>5} tensors {parameters:>8} parameters  "
        f"learning rate {group['lr']:.3g}  weight decay {group['weight_decay']:g}  {dtypes}"
    )
