"""What a run's checkpoints take on the disk, against what is free there. In: a plan's figures. Out: a line, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.checkpoint.save import SMALL_FILES_BYTES
from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.core.files import free_bytes
from steep.core.units import format_bytes, format_interval


@dataclass(frozen=True)
class CheckpointPlan:
    """When a run is saved and how much space that takes."""

    when: str
    bytes_each: int
    most: int
    """Checkpoints that are there at the same time, the one that is being written included."""
    in_background: bool
    folder: Path
    """The run's directory, which may not exist yet."""
    held_bytes: int
    """Of checkpoints that the run has already."""
    free_bytes: int | None
    """On the disk of the run's directory; None where it cannot be asked, or the plan is for another machine."""

    @property
    def most_bytes(self) -> int:
        """Of all of them."""
        return self.most * self.bytes_each

    @property
    def is_short(self) -> bool:
        """Whether the checkpoints do not fit together, though one may."""
        return self.free_bytes is not None and self.most_bytes > self.free_bytes + self.held_bytes

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "when": self.when,
            "bytes": self.bytes_each,
            "most": self.most,
            "total_bytes": self.most_bytes,
            "in_background": self.in_background,
            "free_bytes": self.free_bytes,
        }

    def to_text(self) -> str:
        """One line, and a warning where there is too little space."""
        count = f"up to {self.most} at a time x " if self.most > 1 else ""
        total = f" = {format_bytes(self.most_bytes)}" if self.most > 1 else ""
        free = "" if self.free_bytes is None else f", of {format_bytes(self.free_bytes)} free in {self.folder}"
        line = f"{self.when}: {count}{format_bytes(self.bytes_each)}{total}{free}"
        if not self.is_short:
            return line
        return (
            f"{line}\n  warning: the checkpoints of this run do not fit on the disk together: the run will stop when it is full. "
            "Free some space, lower checkpoint.keep_last or set another run.directory"
        )

    def check(self) -> None:
        """Raises ConfigError where the disk has no space for a single checkpoint."""
        needed = self.bytes_each + SMALL_FILES_BYTES
        if self.free_bytes is not None and needed > self.free_bytes:
            raise ConfigError(
                f"a checkpoint of this run takes {format_bytes(needed)}, and the disk of {self.folder} has "
                f"{format_bytes(self.free_bytes)} free. Free some space, or set another run.directory; with an adapter "
                "checkpoints are far smaller."
            )


def plan_checkpoints(config: RunConfig, bytes_each: int, saves: int, *, is_here: bool = True) -> CheckpointPlan:
    """The checkpoints of a run. saves: how many it writes at most. is_here: whether it will run on this machine."""
    settings = config.checkpoint
    intervals = [f"{settings.every_steps:,} steps"] if settings.every_steps is not None else []
    intervals += [format_interval(settings.every_seconds)] if settings.every_seconds is not None else []
    when = f"every {' and every '.join(intervals)}, and at the end" if intervals else "only at the end of the run"
    best = int(settings.keep_best and bool(config.data.validation))
    folder = Path(config.run.directory).expanduser() / config.run.name
    return CheckpointPlan(
        when,
        bytes_each,
        min(saves, settings.keep_last + best + 1),  # an old one is deleted after the new one is complete
        settings.copies_state,
        folder,
        _held_bytes(folder / "checkpoints"),
        free_bytes(folder) if is_here else None,
    )


def _held_bytes(checkpoints: Path) -> int:
    """Of files that are there; those with several names count once."""
    stats = [path.stat() for path in checkpoints.rglob("*") if path.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())
