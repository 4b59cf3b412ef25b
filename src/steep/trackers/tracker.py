"""What every tracker can do, and how one is built from its name.

A tracker takes records, the mappings that become lines of metrics.jsonl. `kind` is train, evaluate, sample or event;
`step` counts the optimizer updates made before (see steep/metrics.py). Adding a tracker is adding one file with a
`build` function to this folder; the file name is the name in the configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from steep.core.errors import ConfigError
from steep.core.plugins import load_plugin

PACKAGE = "steep.trackers.backends"

Record = Mapping[str, Any]
"""{"kind": "train", "step": 12, "loss": 2.9, ...}; values are JSON values, None where a number does not exist."""


@runtime_checkable
class Tracker(Protocol):
    """A sink of records. Called from one thread of rank 0."""

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> None:
        """Open the sink for a run, new or resumed. `config` is the resolved configuration without secrets."""

    def log(self, record: Record) -> None:
        """Take one record. Kinds and keys that the sink has no use for are left out, never an error."""

    def close(self) -> None:
        """Write out what is pending. Called once, also when the run fails; safe before `start`."""


def storable_text(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold (a byte-level model can make them), as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def build_tracker(name: str, **arguments: Any) -> Tracker:
    """Build the tracker that the file `name` of this folder defines.

    Raises ConfigError for an unknown name or argument, MissingExtraError where its package is not installed.
    """
    module = load_plugin(PACKAGE, name)
    signature = inspect.signature(module.build)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"tracker {name}: {error}. It takes: {', '.join(signature.parameters) or 'nothing'}."
        ) from None
    tracker: Tracker = module.build(**arguments)
    return tracker
