"""What every tracker can do, and how one is built from its name.

A tracker takes records, the mappings that become lines of metrics.jsonl. `kind` is train, evaluate, sample or event;
`step` counts the optimizer updates made before (see steep/metrics.py). To add a tracker, add one file to `backends/`; its name
is the name in the configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from steep.core.errors import ConfigError
from steep.core.plugins import load_plugin

PACKAGE = "steep.trackers.backends"

Record = Mapping[str, Any]
"""{"kind": "train", "step": 12, "loss": 2.9, ...}; values are JSON values, None where a number does not exist."""


@runtime_checkable
class Tracker(Protocol):
    """Somewhere that records go. Called from one thread of the first rank."""

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> None:
        """Open the tracker for a run, new or resumed. `config` is the resolved configuration without secrets."""

    def log(self, record: Record) -> None:
        """Take one record. Kinds and keys that the tracker has no use for are ignored, never an error."""

    def close(self) -> None:
        """Write out what is pending. Called once, also when the run fails; safe before `start`."""


class TrackerPlugin(Protocol):
    """What a file of `backends/` defines."""

    def build(self, **arguments: Any) -> Tracker:
        """The tracker, from the other keys of its entry in `trackers`. Opens nothing: `start` does.

        The signature names the arguments. Imports the tracker's package here or in `start`, not at module level, and raises
        MissingExtraError where it is not installed.
        """


def storable_text(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold (a byte-level model can make them), as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def build_tracker(name: str, **arguments: Any) -> Tracker:
    """Build the tracker that the file `name` of `backends/` defines.

    Raises ConfigError for an unknown name or argument, MissingExtraError where its package is not installed.
    """
    plugin = cast(TrackerPlugin, load_plugin(PACKAGE, name, ("build",)))
    signature = inspect.signature(plugin.build)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"tracker {name}: {error}. It takes: {', '.join(signature.parameters) or 'nothing'}."
        ) from None
    return plugin.build(**arguments)
