"""Configuration of trackers and of the console."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import ConfigDict, Field

from steep.core.section import Seconds, Section


class TrackerConfig(Section):
    """Where metrics go, besides the console and metrics.jsonl, which are always written."""

    model_config = ConfigDict(extra="allow")

    name: str
    """The tracker: a file name in steep/trackers/backends/. Other keys are its arguments."""


class ConsoleConfig(Section):
    """What the terminal shows."""

    log_every_seconds: Seconds = 10.0
    """Time between two printed lines; 0: a line for every step. The first and the last step always have one, and metrics.jsonl
    has every step."""
    log_every_steps: Optional[int] = Field(default=None, ge=1)
    """Steps between two printed lines, in place of `log_every_seconds`."""
    progress: Literal["auto", "bar", "plain"] = "auto"
    """`bar`: a live progress bar; `plain`: lines only. `auto`: a bar on a terminal."""
    width: Optional[int] = Field(default=None, ge=40)
    """Columns. Default: the terminal's."""
