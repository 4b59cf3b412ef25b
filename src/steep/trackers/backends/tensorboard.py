"""TensorBoard event files, under `tensorboard/` in the run directory. Needs the extra `tensorboard`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steep.core.errors import MissingExtraError
from steep.metrics import EVALUATE_METRICS, TRAIN_METRICS
from steep.trackers.tracker import Record, Tracker, storable_text

NOT_CURVES = ("step", "time", "eta_seconds")


class TensorBoardTracker(Tracker):
    """Writes scalars `train/<metric>`, `train/<source>/<metric>` and `evaluate/<text>/<metric>`, and samples as text."""

    def __init__(self, directory: str, flush_seconds: int):
        self._directory = directory
        self._flush_seconds = flush_seconds
        self._writer: Any = None

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # a new event file, which TensorBoard joins with those of earlier starts of the same run
        self._writer = SummaryWriter(str(Path(run_directory) / self._directory), flush_secs=self._flush_seconds)

    def log(self, record: Record) -> None:
        if self._writer is None:
            return
        kind = record.get("kind")
        if kind == "train":
            self._scalars("train", record, [metric.name for metric in TRAIN_METRICS if metric.name not in NOT_CURVES])
            for source, loss in (record.get("loss_by_source") or {}).items():
                of_source = {**loss, "step": record.get("step")}
                self._scalars(f"train/{source}", of_source, ["nats_per_token", "label_tokens"])
        elif kind == "evaluate":
            self._scalars(f"evaluate/{record.get('text')}", record, [metric.name for metric in EVALUATE_METRICS])
        elif kind == "sample":
            text = storable_text(f"{record.get('prompt')}{record.get('text')}")
            block = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown that TensorBoard shows unchanged
            self._writer.add_text(storable_text(f"sample/{record.get('prompt')}"), block, record.get("step"))

    def _scalars(self, tag: str, record: Record, names: list[str]) -> None:
        for name in names:
            value = record.get(name)
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{tag}/{name}", value, record.get("step"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def build(directory: str = "tensorboard", flush_seconds: int = 30) -> TensorBoardTracker:
    """directory: relative to the run directory. Raises MissingExtraError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard", "The tracker tensorboard")
    return TensorBoardTracker(directory, flush_seconds)
