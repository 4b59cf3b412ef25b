"""What `--no-code` refuses, by name before anything is imported and by what the name turned out to be after that.

Only these may be called: public callables of steep.models, steep.optim and steep.trackers; classes of torch.nn and torch.optim;
model, configuration and tokenizer classes of transformers with the class methods that make them. Prefixes alone would not do:
torch.load unpickles, torch.hub.load and torch.utils.cpp_extension.load run foreign code, transformers.os.system is os.system.
Private names and names that lead into another package's module are refused, and so are arguments that fetch code from a hub
(trust_remote_code, use_kernels, an attention implementation that is a repository).
Weakness: it guards against a configuration, not against a malicious installed package of those names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Optional

from steep.core.errors import ConfigError
from steep.core.say import Say
from steep.core.targets.finding import Location, absolute, dotted, find_targets, in_front, split_file

OWN_PACKAGES = ("steep", "torch", "transformers")
_STEEP_MODULES = ("steep.models", "steep.optim", "steep.trackers")
_TORCH_MODULES = ("torch.nn", "torch.optim")
_TRANSFORMERS_BASES = ("PreTrainedModel", "PreTrainedConfig", "PretrainedConfig", "PreTrainedTokenizerBase",
                       "GenerationConfig", "_BaseAutoModelClass", "AutoConfig", "AutoTokenizer")  # fmt: skip
_TRANSFORMERS_METHODS = ("from_pretrained", "from_config", "from_dict", "for_model", "from_model_config")
_CODE_SWITCHES = ("trust_remote_code", "use_kernels", "custom_generate", "auto_map", "code_revision")
_SAFETY_SWITCHES = ("weights_only", "use_safetensors")
WHAT_NO_CODE_ALLOWS = (
    "--no-code allows steep's models, optimizers and trackers, classes of torch.nn and torch.optim, and models, "
    "configurations and tokenizers of transformers"
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
    if package == "steep":
        return None if module.startswith(_STEEP_MODULES) else f"it belongs to {module!r}"
    if package == "torch":
        allowed = inspect.isclass(found) and module.startswith(_TORCH_MODULES)
        return None if allowed else "it is not a class of torch.nn or torch.optim"
    owner = found.__self__ if inspect.ismethod(found) else found
    if not inspect.isclass(owner) or not {base.__name__ for base in owner.__mro__} & set(_TRANSFORMERS_BASES):
        return "it is not a model, configuration or tokenizer"
    if inspect.ismethod(found) and found.__name__ not in _TRANSFORMERS_METHODS:
        return f"of its class only {', '.join(_TRANSFORMERS_METHODS)} are allowed"
    return None


def code_arguments(value: Any, location: Location) -> Iterator[str]:
    """Arguments that would fetch code from a hub."""
    if isinstance(value, dict):
        for key, item in value.items():
            here = (*location, key)
            is_repository = str(key).endswith("_implementation") and any("/" in text for text in _texts(item))
            if key in _SAFETY_SWITCHES and not item:
                yield f"{dotted(here)}: {item!r} allows pickled weights, which run code; --no-code refuses it"
            if (key in _CODE_SWITCHES and item) or is_repository:
                yield f"{dotted(here)}: {item!r} runs code of a hub repository, which --no-code refuses"
            yield from code_arguments(item, here)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from code_arguments(item, (*location, position))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def refused(written: str, reason: str) -> ConfigError:
    """The error of a target that `--no-code` refuses."""
    return ConfigError(f"{written} is refused by --no-code: {reason}. {WHAT_NO_CODE_ALLOWS}")
