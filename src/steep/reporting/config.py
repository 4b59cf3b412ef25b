"""Configuration of the report."""

from __future__ import annotations

from steep.core.section import Section


class ReportConfig(Section):
    """The page written at the end of a run."""

    enabled: bool = True
    """Write report.html and training_loss.png when the run ends or is interrupted."""
