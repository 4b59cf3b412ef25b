"""Configuration of trackers and of the console."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import ConfigDict, Field

from steep.core.section import Section


class TrackerConfig(Section):
    """Where metrics go, besides the console and metrics.jsonl, which are always written."""

    model_config = ConfigDict(extra="allow")

    name: str
    """The tracker: a file name in steep/trackers/backends/. Other keys are its arguments."""


class ConsoleConfig(Section):
    """What the terminal shows."""

    log_every_steps: int = Field(default=1, ge=1)
    """Steps between two printed lines. The first and the last step always have one."""
    progress: Literal["auto", "bar", "plain"] = "auto"
    """`bar`: a live progress bar; `plain`: lines only. `auto`: a bar on a terminal."""
    width: Optional[int] = Field(default=None, ge=40)
    """Columns. Default: the terminal's."""
