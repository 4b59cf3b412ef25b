"""Packages that can be called: `steep.train(config)`, though `steep.train` is also the folder that training lives in.

Importing a submodule binds its package as an attribute of `steep`, over any function of the same name; so the package itself
answers the call. Setting a module's class is Python's documented way to customize a module (data model, section 3.3.2.1).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module whose call is the function of the same name in `steep.api`."""

    def _function(self) -> Any:
        from steep import api

        return getattr(api, self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._function()(*arguments, **keywords)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(self._function())


def make_callable(name: str) -> None:
    """Let the imported module `name` be called."""
    sys.modules[name].__class__ = CallableModule
