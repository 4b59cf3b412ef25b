"""The result of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steep.core.units import format_bytes
from steep.exporters.parity import Parity


@dataclass(frozen=True)
class ExportResult:
    """A model in the format that another program serves, and how it was verified."""

    path: Path
    dtype: str
    size_bytes: int
    parities: list[Parity]
    """One per program that read it in a process of its own; the last is the one that will serve it, where that was available."""

    @property
    def verified_with(self) -> str:
        """Program and version that loaded it in a process of its own."""
        return self.parities[-1].program

    @property
    def largest_logit_difference(self) -> float:
        """Between the trained model in this dtype and the exported one, over the verification texts."""
        return self.parities[-1].largest_logit_difference

    @property
    def loss_change(self) -> float:
        """Nats per token of the exported model minus those of the trained model in fp32, over the verification texts."""
        return self.parities[-1].loss_change

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.dtype}, {format_bytes(self.size_bytes)}. Verified:"]
        return "\n".join([*lines, *(f"  {parity}" for parity in self.parities)])
