"""Configuration of checkpoints."""

from __future__ import annotations

from typing import Optional

from pydantic import Field

from steep.core.section import Count, Seconds, Section


class CheckpointConfig(Section):
    """When the run is saved and what is kept. Its end, SIGTERM, SIGHUP (a closed terminal) and SIGINT always save."""

    every_steps: Optional[Count] = Field(default=None, ge=1)
    """Save every N optimizer steps."""
    every_seconds: Optional[Seconds] = Field(default=None, gt=0)
    """Save when this much time has passed since the last save."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest loss on the first held-out text."""
    asynchronous: bool = True
    """Write in the background: training stops only while the state is copied in memory. Costs one copy of the state. A run
    that is saved only at its end is written without a copy, since nothing waits for it."""

    @property
    def copies_state(self) -> bool:
        """Whether saves go through a copy of the state."""
        return self.asynchronous and (self.every_steps is not None or self.every_seconds is not None)
