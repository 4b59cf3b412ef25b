"""The run: sizes, step, state, loop. Called, it is `steep.api.train`."""

from steep.core.callable_module import make_callable

make_callable(__name__)
