"""What every tracker promises, checked on each of them, also on those that are added later."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from steep.core.errors import MissingExtraError
from steep.core.plugins import plugin_names
from steep.trackers.tracker import PACKAGE, Tracker, build_tracker

RECORDS: list[dict[str, Any]] = [
    {"kind": "event", "step": 0, "message": "started"},
    {"kind": "evaluate", "step": 0, "text": "a/b c", "nats_per_token": 3.0, "perplexity": 20.1, "bits_per_byte": 1.0},
    {"kind": "evaluate", "step": 0, "text": "no bytes known", "nats_per_token": 3.0, "bits_per_byte": None},
    {"kind": "train", "step": 0, "loss": 2.9, "grad_norm": 1.2, "learning_rate": 1e-5, "mfu": None, "new_metric": 1.0},
    {"kind": "train", "step": 1},
    {"kind": "train", "step": 2, "loss": math.nan, "grad_norm": math.inf, "eta_seconds": math.inf},
    {"kind": "sample", "step": 2, "prompt": "", "text": "\x00\x1b[2J\ud800 <b>🦜"},
    {"kind": "of the future", "step": 3},
]


@pytest.fixture(params=plugin_names(PACKAGE))
def tracker(request: pytest.FixtureRequest) -> Tracker:
    try:
        return build_tracker(request.param)
    except MissingExtraError as error:
        pytest.skip(str(error))


def test_takes_every_kind_of_record_twice_in_one_directory(tracker: Tracker, tmp_path: Path) -> None:
    """Also from a run that is resumed: start, log and close are called again in the same directory."""
    assert isinstance(tracker, Tracker)
    directory = tmp_path / "runs" / "new"
    for _ in range(2):
        tracker.start(directory, {"run": {"name": "new"}, "model": {"config": None}})
        for record in RECORDS:
            copy = dict(record)
            tracker.log(record)
            assert record == copy or any(value != value for value in copy.values()), "a record is not changed"
        tracker.close()
    assert list(directory.iterdir()), "a tracker leaves something in the run directory"


def test_can_be_closed_before_it_is_started_and_twice(tracker: Tracker, tmp_path: Path) -> None:
    tracker.close()
    tracker.start(tmp_path, {})
    tracker.close()
    tracker.close()
