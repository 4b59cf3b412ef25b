"""What `--no-code` allows: constructors on a list, with arguments that fetch, read or unpickle nothing.

Allowed are steep's own GPT-2 and optimizers; layers and losses (torch.nn.modules), optimizers and schedulers of torch; and of
transformers configurations, models made from a configuration, and tokenizers that read no file. A name is refused before anything
is imported where the name alone tells; then by what it turned out to be; arguments are looked at before and after nested targets
are built, so that a true value cannot hide in one. `from_pretrained` is refused: `model.pretrained` loads the same without code.
Weakness: it guards against a configuration, not against a malicious installed package of those names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, Optional

from steep.core.errors import ConfigError
from steep.core.say import Say
from steep.core.targets.finding import Location, absolute, dotted, find_targets, in_front, split_file

OWN_PACKAGES = ("steep", "torch", "transformers")
_STEEP_MODULES = ("steep.models", "steep.optim")
_TORCH_MODULES = ("torch.nn", "torch.optim")
_STEEP_CALLABLES = re.compile(r"steep\.models\.gpt2\.build_gpt2_model|steep\.optim\.optimizers\.\w+\.build")
_TORCH_BASES = {"Module": "torch.nn.modules.", "Optimizer": "torch.optim.", "LRScheduler": "torch.optim."}
"""Base class -> the modules whose classes of this kind are allowed; torch.nn.parallel starts communication."""
_TRANSFORMERS_BASES = (
    "PreTrainedModel",
    "PreTrainedConfig",
    "PretrainedConfig",
    "GenerationConfig",
    "PreTrainedTokenizerBase",
)
_TRANSFORMERS_METHODS = ("from_config", "from_dict", "for_model", "from_model_config")
_TRANSFORMERS_FACTORIES = ("_BaseAutoModelClass", "AutoConfig")
_CODE_SWITCHES = ("trust_remote_code", "use_kernels", "custom_generate", "auto_map", "code_revision")
_SAFETY_SWITCHES = ("weights_only", "use_safetensors")
WHAT_NO_CODE_ALLOWS = (
    "--no-code allows steep's GPT-2 and optimizers; layers, losses, optimizers and schedulers of torch; and configurations, "
    "models made from a configuration, and tokenizers of transformers"
)


def announce(value: Any, say: Say) -> None:
    """Say a line for each target that `--no-code` would refuse, before any of them is imported."""
    for location, target in find_targets(value):
        if refusal(target.target) is not None:
            file = split_file(target.target)
            package = target.target.partition(".")[0]
            what = (
                f"{file[1]} of the file {absolute(file[0])}"
                if file
                else f"{target.target} (Python package {package!r})"
            )
            say(f"{in_front(location)}runs {what}")


def refusal(written: str) -> Optional[str]:
    """Why `--no-code` refuses the target of this name, or None. Decided by the name alone, without importing it."""
    if split_file(written) is not None:
        return "it is code in a file"
    parts = written.split(".")
    if parts[0] not in OWN_PACKAGES:
        return f"it is code of the package {parts[0]!r}"
    if any(part.startswith("_") for part in parts):
        return "a part of its name is private"
    if parts[0] == "transformers":
        return None
    modules = _STEEP_MODULES if parts[0] == "steep" else _TORCH_MODULES
    if not written.startswith(tuple(f"{module}." for module in modules)):
        return f"of {parts[0]} only {', '.join(modules)} are allowed"
    return None


def refusal_of_object(found: Any, written: str) -> Optional[str]:
    """Why `--no-code` refuses this callable, now that it is known what it is; None if it does not."""
    package = written.partition(".")[0]
    module = getattr(found, "__module__", None) or ""
    if module != package and not module.startswith(f"{package}."):
        return f"it belongs to {module or 'no module'!r}"
    problem = {"steep": _not_of_steep, "torch": _not_of_torch, "transformers": _not_of_transformers}[package]
    return problem(found)


def _not_of_steep(found: Any) -> Optional[str]:
    name = f"{found.__module__}.{getattr(found, '__qualname__', '')}"
    return None if _STEEP_CALLABLES.fullmatch(name) else "it is neither steep's GPT-2 nor one of its optimizers"


def _not_of_torch(found: Any) -> Optional[str]:
    for base in _bases(found):
        if found.__module__.startswith(_TORCH_BASES.get(base, "\0")):
            return None
    return "it is no layer, loss, optimizer or scheduler of torch"


def _not_of_transformers(found: Any) -> Optional[str]:
    if not inspect.ismethod(found):
        allowed = _bases(found) & set(_TRANSFORMERS_BASES)
        return None if allowed else "it is no class of a model, configuration or tokenizer"
    if not _bases(found.__self__) & {*_TRANSFORMERS_BASES, *_TRANSFORMERS_FACTORIES}:
        return "it is no method of a model, configuration or tokenizer"
    if found.__name__ == "from_pretrained":
        return "it reads files or the hub; model.pretrained loads the same without code"
    is_maker = found.__name__ in _TRANSFORMERS_METHODS
    return None if is_maker else f"of its class only {', '.join(_TRANSFORMERS_METHODS)} are allowed"


def _bases(found: Any) -> set[str]:
    return {base.__name__ for base in found.__mro__} if inspect.isclass(found) else set()


def code_arguments(value: Any, location: Location) -> Iterator[str]:
    """Arguments that would run code, read files or weaken a check. value: as written, or with nested targets built.

    What stands inside a nested target is left out: its arguments are looked at when it is.
    """
    if isinstance(value, list):
        for position, item in enumerate(value):
            yield from code_arguments(item, (*location, position))
    elif isinstance(value, dict) and "_target_" not in value:
        for key, item in value.items():
            here = (*location, key)
            if (reason := _reason_against(str(key), item)) is not None:
                yield f"{dotted(here)}: {item!r:.80} {reason}, which --no-code refuses"
            yield from code_arguments(item, here)


def _reason_against(key: str, item: Any) -> Optional[str]:
    is_off = item is None or item is False  # anything else may count as true
    if key in _SAFETY_SWITCHES and item is not True:
        return "allows pickled weights, which run code"
    if key in _CODE_SWITCHES and not is_off:
        return "runs code of a hub repository"
    if key.endswith("_implementation") and any("/" in text for text in _texts(item)):
        return "runs code of a hub repository"
    if key.endswith("_file") and not is_off:
        return "reads a file"
    return "sets a private attribute" if key.startswith("_") else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def refused(written: str, reason: str) -> ConfigError:
    """The error of a target that `--no-code` refuses."""
    return ConfigError(f"{written} is refused by --no-code: {reason}. {WHAT_NO_CODE_ALLOWS}")
