"""Folders of plug-ins: the file name is the registered name, and a file is imported only when it is chosen."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from steep.core.errors import ConfigError


def plugin_names(package: str) -> list[str]:
    """The names of the plug-ins in `package` (dotted), read from its folder without importing any of them."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} does not exist"
    assert spec.submodule_search_locations is not None, f"{package} is not a package"
    found = (module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name for name in found if not name.startswith("_"))


@lru_cache
def plugin_constant(package: str, name: str, constant: str) -> Any:
    """What the file of a plug-in assigns to a name at its top, a literal; None where it does not. The file is not imported."""
    spec = importlib.util.find_spec(f"{package}.{name}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    values = (node.value for node in assigned if ast.unparse(node.targets[0]) == constant)
    return next(map(ast.literal_eval, values), None)


def load_plugin(package: str, name: str, functions: tuple[str, ...] = (), what: str = "") -> ModuleType:
    """Import plug-in `name` of `package`.

    functions: what every plug-in of the folder defines. what: how the person names the choice, for messages. Raises ConfigError
    with the nearest name for an unknown plug-in, and for one that lacks any of the functions.
    """
    names = plugin_names(package)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{what or package.split('.')[1]}: there is no {name!r}.{hint} There are: {', '.join(names)}."
        )
    plugin = importlib.import_module(f"{package}.{name}")
    missing = [function for function in functions if not callable(getattr(plugin, function, None))]
    if missing:
        raise ConfigError(
            f"{plugin.__file__} does not define {' and '.join(missing)}; every file of {package} defines "
            f"{' and '.join(functions)}."
        )
    return plugin
