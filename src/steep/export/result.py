"""What an export gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steep.core.units import format_bytes


@dataclass(frozen=True)
class ExportResult:
    """A model in the form that another program serves, and how it was verified."""

    path: Path
    dtype: str
    size_bytes: int
    verified_with: str
    """Program and version that loaded it in a process of its own."""
    largest_logit_difference: float
    """Between the trained model in this dtype here and the exported one there, over the verification text."""
    loss_change: float
    """Nats per token of the exported model minus those of the trained model in fp32, over the verification text."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.dtype}, {format_bytes(self.size_bytes)}. Verified with {self.verified_with}: logits differ by "
            f"at most {self.largest_logit_difference:.2g}, loss by {self.loss_change:+.2g} nats/token from fp32."
        )
