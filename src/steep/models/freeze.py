"""Which parameters of a model are not trained. In: a model and `model.freeze`. Out: `requires_grad` of its parameters.

Tensors are told apart by identity: a head that is tied to frozen embeddings is frozen with them, whatever its name.
"""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from steep.core.errors import ConfigError
from steep.core.say import Say
from steep.core.units import counted, format_count
from steep.models.config import FreezeConfig
from steep.models.layers import count_trained, head_weight, is_tied, transformer_layers


def freeze(model: nn.Module, config: FreezeConfig, say: Say) -> None:
    """Freeze what the configuration names. Raises ConfigError for a name that does not exist, or if nothing is left to train.

    Call it after the weights are tied and before the optimizer is made.
    """
    chosen = _of_layers(model, config.first_layers, config.last_layers) | _of_patterns(model, config.patterns)
    if config.embeddings:
        tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        if not tables:
            raise ConfigError(
                f"model.freeze: {type(model).__name__} has no embedding layer (torch.nn.Embedding) to freeze; give patterns"
            )
        chosen |= tables
    left = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in chosen]
    if not left:
        raise ConfigError(
            "model.freeze freezes every parameter of the model, so nothing is left to train; freeze fewer layers or names"
        )
    for parameter in chosen:
        parameter.requires_grad_(False)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    size, trained = sum(parameter.numel() for parameter in frozen), count_trained(model)
    tied = "; the output head is tied to the embeddings, so it is frozen too"
    say(
        f"frozen: {counted(len(frozen), 'tensor')}, {format_count(size)} parameters ({size / (size + trained):.0%} of the "
        f"model); {format_count(trained)} are trained"
        + (tied if is_tied(model) and head_weight(model) in chosen else "")
    )


def _of_layers(model: nn.Module, first: int, last: int) -> set[Tensor]:
    if not first and not last:
        return set()
    layers = list(transformer_layers(model))
    if first + last > len(layers):
        raise ConfigError(
            f"model.freeze: first_layers={first} and last_layers={last} are {first + last} layers, and the model has "
            f"{len(layers)}; at most {len(layers)} together works"
        )
    chosen = layers[:first] + layers[len(layers) - last :]
    return {parameter for layer in chosen for parameter in layer.parameters()}


def _of_patterns(model: nn.Module, patterns: list[str]) -> set[Tensor]:
    """The tensors with a name that matches; a tied tensor has several names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[Tensor] = set()
    for pattern in patterns:
        found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(
                f"model.freeze: {pattern!r} matches no parameter of the model. {_near(pattern, list(named))}"
            )
        chosen.update(found)
    return chosen


def _near(pattern: str, names: list[str]) -> str:
    """Names that may have been meant: those that contain the pattern, else those most like it."""
    plain = pattern.replace("*", "").replace("?", "").strip(".")
    holding = [name for name in names if plain and plain in name]
    if holding:
        return f"A pattern must match the whole name: '*{plain}*' would match {len(holding)}, such as {holding[0]}"
    near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    return f"Similar names: {', '.join(near)}"
