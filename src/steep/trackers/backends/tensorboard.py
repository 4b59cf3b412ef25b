"""TensorBoard event files, under `tensorboard/` in the run directory. Needs the extra `tensorboard`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steep.core.errors import MissingExtraError
from steep.metrics import EVALUATE_METRICS, TRAIN_METRICS
from steep.trackers.tracker import Record, storable_text

NOT_CURVES = ("step", "time", "eta_seconds")


class TensorBoardTracker:
    """Writes scalars `train/<metric>`, `train/<source>/<metric>` and `evaluate/<text>/<metric>`, and samples as text."""

    def __init__(self, directory: str, flush_seconds: int):
        self._directory = directory
        self._flush_seconds = flush_seconds
        self._writer: Any = None

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> None:
        """Open a new event file; TensorBoard joins it with those of earlier starts of the same run."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(run_directory) / self._directory), flush_secs=self._flush_seconds)

    def log(self, record: Record) -> None:
        """Write the numbers of one record; numbers that do not exist are left out."""
        if self._writer is None:
            return
        kind = record.get("kind")
        if kind == "train":
            self._scalars("train", record, [metric.name for metric in TRAIN_METRICS if metric.name not in NOT_CURVES])
            for source, loss in (record.get("loss_by_source") or {}).items():
                self._scalars(
                    f"train/{source}", {**loss, "step": record.get("step")}, ["nats_per_token", "label_tokens"]
                )
        elif kind == "evaluate":
            self._scalars(f"evaluate/{record.get('text')}", record, [metric.name for metric in EVALUATE_METRICS])
        elif kind == "sample":
            self._sample(record)

    def _scalars(self, tag: str, record: Record, names: list[str]) -> None:
        for name in names:
            value = record.get(name)
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{tag}/{name}", value, record.get("step"))

    def _sample(self, record: Record) -> None:
        """Write the sample as a preformatted Markdown block, which TensorBoard shows unchanged."""
        text = storable_text(f"{record.get('prompt')}{record.get('text')}")
        block = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(storable_text(f"sample/{record.get('prompt')}"), block, record.get("step"))

    def close(self) -> None:
        """Write what is pending and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def build(directory: str = "tensorboard", flush_seconds: int = 30) -> TensorBoardTracker:
    """directory: relative to the run directory. Raises MissingExtraError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard", "The tracker tensorboard")
    return TensorBoardTracker(directory, flush_seconds)
