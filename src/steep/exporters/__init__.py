"""Turn a checkpoint into what other programs serve. Called, it is `steep.api.export`."""

from steep.core.callable_module import make_callable

make_callable(__name__)
