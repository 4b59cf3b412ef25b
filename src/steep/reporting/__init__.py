"""The page about a run, and its figures."""

from __future__ import annotations

from typing import Any

__all__ = ["memory_plot"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # matplotlib is imported when a figure is asked for
        from steep.reporting import plots

        return getattr(plots, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
