"""Which parameters of a model are left as they are. In: a model and `model.freeze`. Out: `requires_grad` of its parameters.

Everything goes by the tensor's identity: a head that is tied to frozen embeddings is frozen with them, whatever its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from steep.core.errors import ConfigError
from steep.core.units import format_count
from steep.models.config import FreezeConfig
from steep.models.layers import head_weight, is_tied, transformer_layers


@dataclass(frozen=True)
class Frozen:
    """What was frozen."""

    tensors: int
    parameters: int
    trained_parameters: int
    tied_head: bool
    """Whether the output head is frozen because it is the embedding."""

    def __str__(self) -> str:
        share = self.parameters / (self.parameters + self.trained_parameters)
        line = (
            f"frozen: {self.tensors} tensors, {format_count(self.parameters)} parameters ({share:.0%} of the model); "
            f"{format_count(self.trained_parameters)} are trained"
        )
        return line + ("; the output head is tied to the embeddings, so it is frozen too" if self.tied_head else "")


def freeze(model: nn.Module, config: FreezeConfig) -> Frozen:
    """Freeze what the configuration names. Raises ConfigError for a name that is not there, or where nothing is left to train.

    Call it once the weights are tied and before the optimizer is made.
    """
    chosen = _of_layers(model, config.first_layers, config.last_layers) | _of_patterns(model, config.patterns)
    if config.embeddings:
        chosen |= _of_embeddings(model)
    left = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in chosen]
    if not left:
        raise ConfigError(
            "model.freeze freezes every parameter of the model, so that nothing is left to train; freeze fewer layers or names"
        )
    for parameter in chosen:
        parameter.requires_grad_(False)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return Frozen(
        tensors=len(frozen),
        parameters=sum(parameter.numel() for parameter in frozen),
        trained_parameters=sum(parameter.numel() for parameter in left),
        tied_head=is_tied(model) and head_weight(model) in chosen,
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
    """The tensors with a name that matches; each name of a tied tensor counts."""
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
    """Names that may have been meant: those that hold the pattern as it is, else those most like it."""
    plain = pattern.replace("*", "").replace("?", "").strip(".")
    holding = [name for name in names if plain and plain in name]
    if holding:
        return f"A pattern is matched with the whole name: '*{plain}*' would match {len(holding)}, such as {holding[0]}"
    near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    return f"Names are such as {', '.join(near)}"


def _of_embeddings(model: nn.Module) -> set[Tensor]:
    chosen = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    if not chosen:
        raise ConfigError(
            f"model.freeze: embeddings, but {type(model).__name__} has no embedding layer (torch.nn.Embedding); give patterns"
        )
    return chosen
