"""`_target_`: any callable named in the configuration, found, announced, checked and called.

Three forms: an import path (`my_pkg.models.build`), a file and object (`./my_model.py:build`, relative to the current
directory), a library callable (`transformers.AutoModelForCausalLM.from_config`). The other keys of the mapping are its
arguments; a `_target_` nested in them, in lists too, is built first. Arguments are compared with the signatures, of
nested targets too, before anything is called, and all mistakes are reported together.

A configuration with targets is as trusted as a script: `announce` gives a line for every target that is not the user's
own library's, to be printed before `check`, `resolve` or `build` imports it.

With `allow_code=False` (`--no-code`) only these may be called, and everything else is refused by name before it is
imported: public callables of steep.models, steep.optim and steep.trackers; classes of torch.nn and torch.optim; model,
configuration and tokenizer classes of transformers with the class methods that make them. Prefixes alone would
not do: torch.load unpickles, torch.hub.load and torch.utils.cpp_extension.load run foreign code, transformers.os.system is
os.system. Private names and names that lead into another package's module are refused, and so are arguments that
fetch code from a hub (trust_remote_code, use_kernels, an attention implementation that is a repository).
Weakness: `--no-code` guards against a configuration, not against a malicious installed package of those names.
No torch and no transformers unless a target names them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Optional, Union

from pydantic import BaseModel, ValidationError

from steep.core.errors import ConfigError
from steep.core.section import Target

Location = tuple[Union[str, int], ...]

OWN_PACKAGES = ("steep", "torch", "transformers")
_STEEP_MODULES = ("steep.models", "steep.optim", "steep.trackers")
_TORCH_MODULES = ("torch.nn", "torch.optim")
_TRANSFORMERS_BASES = ("PreTrainedModel", "PreTrainedConfig", "PretrainedConfig", "PreTrainedTokenizerBase",
                       "GenerationConfig", "_BaseAutoModelClass", "AutoConfig", "AutoTokenizer")  # fmt: skip
_TRANSFORMERS_METHODS = ("from_pretrained", "from_config", "from_dict", "for_model", "from_model_config")
_CODE_SWITCHES = ("trust_remote_code", "use_kernels", "custom_generate", "auto_map", "code_revision")
_SAFETY_SWITCHES = ("weights_only", "use_safetensors")
_WHAT_NO_CODE_ALLOWS = (
    "--no-code allows steep's models, optimizers and trackers, classes of torch.nn and torch.optim, and models, "
    "configurations and tokenizers of transformers"
)


class TargetProblems(ConfigError):
    """Targets that cannot be used. `problems` holds one line each."""

    def __init__(self, problems: Collection[str], advice: str = ""):
        self.problems = tuple(problems)
        head = f"{len(self.problems)} problems with _target_:\n  " if len(self.problems) > 1 else ""
        super().__init__(head + "\n  ".join(self.problems) + (f"\n{advice}" if advice else ""))


# --- finding ----------------------------------------------------------------------------------------------------------


def find_targets(value: Any) -> list[tuple[str, Target]]:
    """Every target in a configuration, section, mapping or list, nested ones before those that hold them.

    Returns (dotted location, target). Raises TargetProblems for a `_target_` that is not text.
    """
    return [(_dotted(location), target) for location, target in _walk(value, ())]


def _walk(value: Any, location: Location) -> Iterator[tuple[Location, Target]]:
    target = as_target(value, location)
    if target is not None:
        yield from _walk_items(target.arguments.items(), location)
        yield location, target
    elif isinstance(value, BaseModel):
        yield from _walk_items(_fields(value), location)
    elif isinstance(value, dict):
        yield from _walk_items(value.items(), location)
    elif isinstance(value, (list, tuple)):
        yield from _walk_items(enumerate(value), location)


def _walk_items(items: Any, location: Location) -> Iterator[tuple[Location, Target]]:
    for key, item in items:
        yield from _walk(item, (*location, key))


def _fields(model: BaseModel) -> Iterator[tuple[str, Any]]:
    yield from model.__dict__.items()
    yield from (model.model_extra or {}).items()


def as_target(value: Any, location: Location = ()) -> Optional[Target]:
    """`value` as a Target if it is one or a mapping with `_target_`, else None."""
    if isinstance(value, Target) or not (isinstance(value, dict) and "_target_" in value):
        return value if isinstance(value, Target) else None
    try:
        return Target.model_validate(value)
    except ValidationError as error:
        place = _dotted((*location, "_target_"))
        raise TargetProblems(
            [f"{place}: {value['_target_']!r} is not the name of a callable, such as my_pkg.build"]
        ) from error


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


# --- announcing and refusing ------------------------------------------------------------------------------------------


def announce(value: Any) -> list[str]:
    """A line for each target that `--no-code` would refuse, to be printed before any of them is imported."""
    return [
        f"{_place(location)}runs {_origin(target.target)}"
        for location, target in find_targets(value)
        if refusal(target.target) is not None
    ]


def _place(location: str) -> str:
    return f"{location}: " if location else ""


def _origin(written: str) -> str:
    file = split_file(written)
    if file is None:
        return f"{written} (Python package {written.partition('.')[0]!r})"
    return f"{file[1]} of the file {_resolved(file[0])}"


def split_file(written: str) -> Optional[tuple[str, str]]:
    """(file, object) of `./file.py:object`, or None for an import path."""
    file, colon, name = written.rpartition(":")
    return (file, name) if colon else None


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


def _refusal_of_object(found: Any, written: str) -> Optional[str]:
    """Why `--no-code` refuses this callable, now that it is known what it is; None if it does not."""
    package = written.partition(".")[0]
    module = getattr(found, "__module__", None) or ""
    if module != package and not module.startswith(f"{package}."):
        return f"it belongs to {module or 'no module'!r}"
    if package == "steep":
        return None if module.startswith(_STEEP_MODULES) else f"it belongs to {module!r}"
    if package == "torch":
        return (
            None
            if inspect.isclass(found) and module.startswith(_TORCH_MODULES)
            else "it is not a class of torch.nn or torch.optim"
        )
    owner = found.__self__ if inspect.ismethod(found) else found
    if not inspect.isclass(owner) or not {base.__name__ for base in owner.__mro__} & set(_TRANSFORMERS_BASES):
        return "it is not a model, configuration or tokenizer"
    if inspect.ismethod(found) and found.__name__ not in _TRANSFORMERS_METHODS:
        return f"of its class only {', '.join(_TRANSFORMERS_METHODS)} are allowed"
    return None


def _code_arguments(value: Any, location: Location) -> Iterator[str]:
    """Arguments that would fetch code from a hub."""
    if isinstance(value, dict):
        for key, item in value.items():
            here = (*location, key)
            is_repository = str(key).endswith("_implementation") and any("/" in text for text in _texts(item))
            if key in _SAFETY_SWITCHES and not item:
                yield f"{_dotted(here)}: {item!r} allows pickled weights, which run code; --no-code refuses it"
            if (key in _CODE_SWITCHES and item) or is_repository:
                yield f"{_dotted(here)}: {item!r} runs code of a hub repository, which --no-code refuses"
            yield from _code_arguments(item, here)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _code_arguments(item, (*location, position))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


# --- resolving --------------------------------------------------------------------------------------------------------


def resolve(target: Union[Target, str], *, allow_code: bool = True) -> Callable[..., Any]:
    """The callable that a target names, imported. Raises ConfigError naming the nearest module or object."""
    written = target.target if isinstance(target, Target) else target
    if not allow_code and (reason := refusal(written)):
        raise _refused(written, reason)
    file = split_file(written)
    if file is not None:
        found = _attribute(_import_file(*file, written), file[1].split("."), written)
    else:
        found = _resolve_import_path(written, only_own=not allow_code)
    if not callable(found):
        raise ConfigError(_not_callable(found, written))
    if not allow_code and (reason := _refusal_of_object(found, written)):
        raise _refused(written, reason)
    return found  # type: ignore[no-any-return]


def _refused(written: str, reason: str) -> ConfigError:
    return ConfigError(f"{written} is refused by --no-code: {reason}. {_WHAT_NO_CODE_ALLOWS}")


def _resolve_import_path(written: str, only_own: bool) -> Any:
    parts = written.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{written!r} is no callable's name; write package.module.name or ./file.py:name")
    module, used = _import_longest(parts, written)
    found: Any = module
    for position in range(used, len(parts)):
        found = _attribute(found, parts[position : position + 1], written)
        if only_own and isinstance(found, ModuleType) and found.__name__.partition(".")[0] != parts[0]:
            raise _refused(written, f"{'.'.join(parts[: position + 1])} is the module {found.__name__!r}")
    return found


def _import_longest(parts: list[str], written: str) -> tuple[ModuleType, int]:
    """The module with the longest name that `parts` begin with, and how many parts that name has."""
    module = _import_module(parts[0], written)
    for count in range(2, len(parts)):
        if parts[count - 1] in vars(module) and not isinstance(vars(module)[parts[count - 1]], ModuleType):
            return module, count - 1
        if not hasattr(module, "__path__"):
            return module, count - 1
        name = ".".join(parts[:count])
        if importlib.util.find_spec(name) is None:
            return module, count - 1
        module = _import_module(name, written)
    return module, len(parts) - 1


def _import_module(name: str, written: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise ConfigError(f"{written}: {_no_such_module(name)}") from error
        raise ConfigError(f"{written}: {_own_words(error)}") from error
    except Exception as error:
        raise ConfigError(f"{written}: {_own_words(error)}") from error


def _no_such_module(name: str) -> str:
    top = name.partition(".")[0]
    if Path(f"{top}.py").is_file() or Path(top).is_dir():
        place = f"./{top}.py:name" if Path(f"{top}.py").is_file() else f"./{top}/file.py:name"
        return (
            f"no package {top!r} is installed, but it lies in the current directory: write {place}, or set PYTHONPATH=."
        )
    near = get_close_matches(top, {module.name for module in pkgutil.iter_modules()}, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]!r}?" if near else "; install it, or name a file as in ./my_model.py:build"
    return f"no package {top!r} is installed{hint}"


def _attribute(found: Any, names: list[str], written: str) -> Any:
    for name in names:
        try:
            found = getattr(found, name)
        except AttributeError as error:
            if name in _submodules(found):
                raise ConfigError(f"{written} is a module; name a function or class in it") from error
            owner = getattr(found, "__name__", type(found).__name__)
            public = [other for other in dir(found) if not other.startswith("_")]
            near = _nearest(name, [*public, *_submodules(found)])
            few = f"; it has {', '.join(public[:8])}" if 0 < len(public) <= 8 else ""
            hint = f"; did you mean {near[0]!r}?" if near else few
            raise ConfigError(f"{written}: {_display(owner)} has no {name!r}{hint}") from error
        except ImportError as error:  # transformers' lazy modules import on access
            raise ConfigError(f"{written}: {_own_words(error)}") from error
    return found


def _nearest(name: str, names: list[str]) -> list[str]:
    """The name that differs in case alone, else the one most like it, else none."""
    same = [other for other in names if other.lower() == name.lower()]
    return same[:1] or get_close_matches(name, names, n=1, cutoff=0.6)


def _display(owner: str) -> str:
    module = sys.modules.get(owner)
    file = getattr(module, "__file__", None)
    return f"the file {os.path.relpath(file)}" if file and owner.startswith(_FILE_MODULE) else owner


def _submodules(found: Any) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(found.__path__)] if hasattr(found, "__path__") else []


def _not_callable(found: Any, written: str) -> str:
    if not isinstance(found, ModuleType):
        return f"{written} is {found!r:.60}, which cannot be called; a function or class is needed"
    names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
    own = [name for name in names if getattr(vars(found)[name], "__module__", None) == found.__name__]
    examples = ", ".join(f"{written}.{name}" for name in own[:3])
    return f"{written} is a module; name a function or class in it" + (f", such as {examples}" if examples else "")


# --- files ------------------------------------------------------------------------------------------------------------

_FILE_MODULE = "steep_target_"


def _resolved(file: str) -> Path:
    return Path(os.path.expanduser(file)).resolve()


def _import_file(file: str, name: str, written: str) -> ModuleType:
    """Import a file under a name of its own; sys.path is not touched. An unchanged file is imported once."""
    path = _resolved(file)
    if path.suffix != ".py" or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{written!r} is no callable's name; write ./file.py:name, or package.module.name")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{written}: {_unreadable(path, file, error)}") from error
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:12]
    module_name = f"{_FILE_MODULE}{path.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"{written}: {_own_words(error, path)}") from error
    return module


def _unreadable(path: Path, file: str, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"the file {file} cannot be read: {error.strerror}"
    there = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it was looked for at {path}"
    return f"the file {file} does not exist{hint}"


def _own_words(error: BaseException, path: Optional[Path] = None) -> str:
    """An exception of foreign code in one line: where it was raised, what it says, and the way out if it is known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(error.filename)}:{error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and frame.filename == str(path)]
    foreign = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    last = (own or foreign)[-1:]
    place = f"{_relative(last[0].filename)}:{last[0].lineno}: " if last else ""
    hint = _neighbour_hint(error, path.parent) if path is not None and isinstance(error, ModuleNotFoundError) else ""
    return f"{place}{type(error).__name__}: {error}{hint}"


def _neighbour_hint(error: ModuleNotFoundError, folder: Path) -> str:
    """What to do if the missing module lies beside the file."""
    top = str(error.name).partition(".")[0]
    if not (folder / f"{top}.py").exists() and not (folder / top).is_dir():
        return ""
    return f". {top} lies beside it, but a file is imported alone: set PYTHONPATH={_relative(str(folder))}"


def _relative(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith(os.path.join("..", "..")) else relative


# --- checking ---------------------------------------------------------------------------------------------------------


def check(value: Any, *, given: Collection[str] = (), allow_code: bool = True, location: str = "") -> None:
    """Resolve every target in `value` and compare its arguments with the callable's signature; call nothing.

    given: arguments that steep will add to the outermost target (`extra` of `build`).
    Raises TargetProblems listing everything: refused targets, unknown names, unknown and missing arguments.
    """
    problems = [problem for checked in _check_all(value, given, allow_code, location) for problem in checked.problems]
    if problems:
        raise TargetProblems(problems)


def check_run(config: Any, say: Callable[[str], None], allow_code: bool) -> None:
    """Print every foreign target of a RunConfig before it is imported, then check all signatures.

    Raises ConfigError with every problem. Imports what the targets name, torch and transformers too; loads no weights.
    """
    for line in announce(config):
        say(line)
    problems = []
    for name, given in (("model", ()), ("optimizer", ("params",)), ("trackers", ())):
        try:
            check(getattr(config, name), given=given, allow_code=allow_code, location=name)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


@dataclass(frozen=True)
class _Checked:
    location: str
    callable: Optional[Callable[..., Any]]
    problems: list[str]


def _check_all(value: Any, given: Collection[str], allow_code: bool, location: str) -> list[_Checked]:
    start: Location = tuple(location.split(".")) if location else ()
    found = list(_walk(value, start))
    if not allow_code and (
        refused := [_refused_line(place, target) for place, target in found if refusal(target.target)]
    ):
        raise TargetProblems(refused, f"{_WHAT_NO_CODE_ALLOWS}.")  # before anything is imported
    return [_check_one(place, target, given if place == start else (), allow_code) for place, target in found]


def _refused_line(place: Location, target: Target) -> str:
    return f"{_place(_dotted(place))}{target.target} is refused by --no-code: {refusal(target.target)}"


def _check_one(place: Location, target: Target, given: Collection[str], allow_code: bool) -> _Checked:
    location = _dotted(place)
    problems = [] if allow_code else list(_code_arguments(_without_nested(target.arguments), place))
    try:
        found = resolve(target, allow_code=allow_code)
    except ConfigError as error:
        return _Checked(location, None, [f"{_place(location)}{error}", *problems])
    problems += [f"{_place(location)}{line}" for line in signature_problems(found, target, given)]
    return _Checked(location, found, problems)


def _without_nested(value: Any) -> Any:
    """The arguments without nested targets, which are checked for themselves."""
    if isinstance(value, dict):
        return {
            key: _without_nested(item)
            for key, item in value.items()
            if not (isinstance(item, dict) and "_target_" in item)
        }
    return [_without_nested(item) for item in value] if isinstance(value, list) else value


def signature_problems(found: Callable[..., Any], target: Target, given: Collection[str] = ()) -> list[str]:
    """What is wrong with a target's arguments: one line each. Empty for callables that have no readable signature."""
    parameters = _parameters(found)
    if parameters is None:
        return []
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    written = target.target
    both = [name for name in target.arguments if name in given]
    problems = [f"{written}: {name} is given by steep; leave it out" for name in both]
    if not takes_any:
        problems += [f"{written} {_unknown_argument(name, named)}" for name in target.arguments if name not in named]
        problems += [f"{written} does not take {name!r}, which steep gives it" for name in given if name not in named]
    known = {*target.arguments, *given}
    missing = [name for name, p in named.items() if p.default is p.empty and name not in known]
    problems += [f"{written} needs the argument {_annotated(name, named)}, which is not given" for name in missing]
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    problems += [f"{written} takes {name!r} by position only; wrap it in a function of your own" for name in positional]
    return problems


def _parameters(found: Callable[..., Any]) -> Optional[dict[str, inspect.Parameter]]:
    try:
        return dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # some functions written in C have none
        return None


def _unknown_argument(name: str, named: dict[str, inspect.Parameter]) -> str:
    if name.startswith("_") and name.endswith("_"):
        return f"cannot be given {name!r}: of Hydra's keys steep knows only _target_"
    near = get_close_matches(name, list(named), n=1, cutoff=0.55)
    takes = f". It takes: {', '.join(named)}" if named else ". It takes no arguments"
    return f"has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else takes)


def _annotated(name: str, named: dict[str, inspect.Parameter]) -> str:
    annotation = named[name].annotation
    if annotation is inspect.Parameter.empty:
        return repr(name)
    return f"{name!r} ({annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)})"


# --- building ---------------------------------------------------------------------------------------------------------


def build(target: Union[Target, dict[str, Any]], *, allow_code: bool = True, location: str = "", **extra: Any) -> Any:
    """Check everything, then build nested targets, then call the target with its arguments and `extra`.

    Raises TargetProblems before anything is called, or ConfigError with file and line if a call raises.
    """
    whole = as_target(target)
    if whole is None:
        raise TypeError(f"build needs a Target or a mapping with _target_, not {target!r}")
    check(whole, given=tuple(extra), allow_code=allow_code, location=location)
    start: Location = tuple(location.split(".")) if location else ()
    return _build(whole, start, allow_code, extra)


def _build(target: Target, location: Location, allow_code: bool, extra: dict[str, Any]) -> Any:
    arguments = {key: _build_value(item, (*location, key), allow_code) for key, item in target.arguments.items()}
    found = resolve(target, allow_code=allow_code)
    try:
        return found(**arguments, **extra)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{_place(_dotted(location))}{target.target} failed: {_own_words(error)}") from error


def _build_value(value: Any, location: Location, allow_code: bool) -> Any:
    target = as_target(value, location)
    if target is not None:
        return _build(target, location, allow_code, {})
    if isinstance(value, dict):
        return {key: _build_value(item, (*location, key), allow_code) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_build_value(item, (*location, position), allow_code) for position, item in enumerate(value)]
    return value
