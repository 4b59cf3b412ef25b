"""Configuration of checkpoints."""

from __future__ import annotations

from typing import Literal, Optional, Union

from pydantic import Field

from steep.core.section import Count, Seconds, Section


class CheckpointConfig(Section):
    """When the run is saved and what is kept. Its end always saves, and so do SIGTERM, SIGINT, SIGHUP (a closed terminal),
    SIGUSR1, SIGUSR2 and SIGXCPU (batch systems send these before a job's time is up)."""

    every_steps: Optional[Count] = Field(default=None, ge=1)
    """Save every N optimizer steps."""
    every_seconds: Optional[Seconds] = Field(default=1800.0, gt=0)
    """Save when this much time has passed since the last save: half an hour (`30min`). null: not by time."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest loss on the first held-out text."""
    asynchronous: Union[Literal["auto"], bool] = "auto"
    """Write in the background: training stops only while the state is copied in memory. Costs one copy of the state. `auto`: on a
    GPU, and on a CPU where the copy fits and the run is saved before its end. Decided when the run starts."""

    @property
    def saves_before_the_end(self) -> bool:
        """Whether the run may be saved while it goes on."""
        return self.every_steps is not None or self.every_seconds is not None

    @property
    def copies_state(self) -> bool:
        """Whether saves go through a copy of the state. False for `auto`, which a run decides when it starts."""
        return self.asynchronous is True and self.saves_before_the_end
