"""Configuration of the training loop."""

from __future__ import annotations

from typing import Annotated, Literal, Optional, Union

from pydantic import Field, model_validator

from steep.core.section import Bytes, Count, Seconds, Section
from steep.parallelize.config import Checkpointing


class TrainConfig(Section):
    """How long, in which batches and in which precision."""

    global_batch_size: int = Field(default=8, ge=1)
    """Sequences per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: Optional[Union[Literal["auto"], Annotated[int, Field(ge=1)]]] = "auto"
    """Sequences per forward pass; must divide global_batch_size. `auto`: as many as keep the device busy, or as fit into its
    memory; decided when the run starts and fixed from then on. null: the global batch. The loss does not depend on it."""
    epochs: Optional[float] = Field(default=None, gt=0)
    """Passes over the training sequences. Give one of epochs, steps, tokens; default: 1 epoch."""
    steps: Optional[Count] = Field(default=None, ge=1)
    """Optimizer steps."""
    tokens: Optional[Count] = Field(default=None, ge=1)
    """Training tokens, rounded up to complete steps; padding in the last, short sequence of a source counts as tokens."""
    max_seconds: Optional[Seconds] = None
    """Save and leave after this much time, counted from the start of the process's training loop."""
    max_grad_norm: Optional[float] = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm. null: no clipping."""
    precision: Literal["auto", "mixed_bf16", "mixed_fp16", "bf16", "fp32"] = "auto"
    """`mixed_bf16`: fp32 master weights, bf16 autocast; `mixed_fp16`: fp16 autocast with loss scaling, for GPUs without bf16
    (T4, V100); `bf16`: everything bf16 (loses small updates). `auto`: on a GPU mixed_bf16 where it has bf16, else mixed_fp16; on
    a CPU fp32 or mixed_bf16, whichever is faster when measured. A run keeps what was chosen at its start."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    threads: Optional[int] = Field(default=None, ge=1)
    """CPU threads of torch. Default: OMP_NUM_THREADS, else one per physical core this process may use."""
    compile: bool = False
    """Compile each transformer layer with torch.compile: faster steps after a slow start."""
    activation_checkpointing: Checkpointing = None
    """Compute layers again in the backward pass instead of keeping what they computed: less memory, more time. `true` (`full`),
    `selective`, or a mapping."""
    ema_decay: Optional[float] = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights, such as 0.999; `steep average RUN --weights ema` writes it. 4 bytes per
    trained parameter."""
    on_spike: Literal["continue", "skip", "rollback"] = "continue"
    """What follows a loss far above those before it (median + 6 scaled median deviations of the last 64). `continue`: it is
    logged with its documents; a loss that is not finite stops the run. `skip`: the step makes no update. `rollback`: the run goes
    on from its newest checkpoint, and the steps up to the spike make no update."""
    spike_window_steps: int = Field(default=8, ge=1)
    """`rollback`: how many steps, up to and including the spike, make no update; steps before the checkpoint are not affected."""
    loss_chunk_bytes: Bytes = 64 * 2**20
    """Largest piece of logits that exists at a time."""
    deterministic: bool = False
    """Only deterministic kernels (on CUDA slower; on CPU they are by themselves)."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        lengths = [name for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(f"the run's length is given by {' and '.join(lengths)}; give one of them")
        checkpointing = self.activation_checkpointing
        if self.compile and checkpointing is not None and checkpointing.mode == "selective":
            raise ValueError(
                "activation_checkpointing selective chooses among single operations, which compile fuses; use full or every_nth, "
                "or remove compile"
            )
        micro = self.micro_batch_size
        if isinstance(micro, int) and self.global_batch_size % micro:
            fits = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            nearest = sorted(sorted(fits, key=lambda n: abs(n - micro))[:3])
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size={micro}; "
                f"these micro-batch sizes fit: {', '.join(map(str, nearest))}"
            )
        return self
