"""Held-out scores and generated text. Called, it is `steep.api.evaluate`."""

from steep.core.callable_module import make_callable

make_callable(__name__)
