"""Does everything train that should, and nothing else? Checked before the first step and after the first updates.

In: a model and its optimizer. Out: lines for the person, or an error that names the tensors. The training loss falls even when
half of the model does not change, so this looks at the weights: each trainable tensor must have had a gradient and must have
changed, and no frozen tensor may have changed. Main choice: sums over the bits of a tensor (32 to 64 KiB per tensor) in place of
a copy; nothing is drawn at random and nothing is written to the model. Weakness: frozen quantized weights are not compared, and
changes inside one block of a large tensor that cancel to the bit are not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steep.core.errors import ConfigError, TrainingError
from steep.core.say import Say
from steep.core.units import counted, format_count, listing
from steep.optim.param_groups import describe_group

FIRST_CHECK_UPDATES = 2
"""The first update is enough for all but weights that come after some that begin at zero, as an adapter's do."""

PATIENCE_UPDATES = 8
"""How long a gradient may be exactly zero: every matrix that begins at zero hides those before it for one update."""

WORDS_PER_TENSOR = 4096


def check_groups(model: nn.Module, optimizer: torch.optim.Optimizer, say: Say) -> None:
    """Say the table of parameter groups, and what is frozen. Raises ConfigError unless the optimizer holds exactly what is
    trainable."""
    updated = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = list(model.named_parameters())
    left_out = [name for name, parameter in named if parameter.requires_grad and parameter not in updated]
    frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
    held = [name for name, parameter in frozen.items() if parameter in updated]
    kind = type(optimizer).__name__
    if left_out:
        raise ConfigError(
            f"optimizer {kind} updates none of these trainable tensors: {listing(left_out)}. Pass it all parameter "
            "groups, or freeze the tensors (model.freeze)"
        )
    if held:
        raise ConfigError(
            f"optimizer {kind} holds frozen tensors: {listing(held)}. Pass the parameter groups unchanged"
        )
    for group in optimizer.param_groups:
        say(f"  {describe_group(group)}")
    if frozen:
        numbers = format_count(sum(parameter.numel() for parameter in frozen.values()))
        say(f"  {'frozen':<10} {len(frozen):>5} tensors {numbers:>8} parameters")


@dataclass
class _Watched:
    """A trainable tensor that has not yet been seen to train."""

    parameter: nn.Parameter
    before: Tensor
    group: dict[str, Any]
    largest: Tensor | None = None
    """() fp32: the largest number in any of its gradients."""

    @property
    def largest_gradient(self) -> float:
        return 0.0 if self.largest is None else float(self.largest)


@dataclass
class TrainableCheck:
    """Watches the first updates of a process. Made once the weights are those that training begins with; ends by itself."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    say: Say
    updates: int = 0
    """Updates with a rate above zero."""
    _moving: dict[str, _Watched] = field(default_factory=dict)
    _reached: set[str] = field(default_factory=set)
    """The tensors that a backward pass has given a gradient."""
    _resting: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _trainable: int = 0
    _last_multiplier: float = 0.0
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.model.named_parameters():
            if parameter.numel() == 0:
                continue
            if parameter.requires_grad:
                self._moving[name] = _Watched(parameter, fingerprint(parameter), groups[parameter])
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
                )
            elif (
                parameter.is_floating_point() and isinstance(parameter, nn.Parameter) and type(parameter.data) is Tensor
            ):
                self._resting[name] = (parameter, fingerprint(parameter))
        self._trainable = len(self._moving)
        self._handles.append(self.optimizer.register_step_pre_hook(lambda *_: self._look_at_gradients()))

    def after_step(self, multiplier: float, last: bool) -> None:
        """Call it after each update; `last`: no other follows. Raises TrainingError."""
        if not self._handles:
            return
        self.updates += multiplier > 0
        rising, self._last_multiplier = multiplier > self._last_multiplier, multiplier
        due = self.updates >= FIRST_CHECK_UPDATES and self.updates & (self.updates - 1) == 0  # 2, 4, 8, ...
        if self.updates == 0 or not (due or last):
            return
        self._check_frozen()
        self._forget_those_that_train()
        self._check_gradients()
        self._check_movement(at_peak=last or not rising)
        if last or not self._moving:
            for handle in self._handles:
                handle.remove()
            self._handles, self._moving, self._resting = [], {}, {}

    def _look_at_gradients(self) -> None:
        for watched in self._moving.values():
            if watched.parameter.grad is not None:
                largest = torch.linalg.vector_norm(watched.parameter.grad.detach(), torch.inf).float()
                watched.largest = largest if watched.largest is None else torch.maximum(watched.largest, largest)

    def _check_frozen(self) -> None:
        moved = _changed(self._resting)
        if moved:
            raise TrainingError(
                f"{_tensors(len(moved), 'frozen')} changed in the first {self.updates} updates: {listing(moved)}. A custom "
                "optimizer writes to tensors that it was not given, or the model's forward pass does. The run stops here."
            )
        self._resting = {}

    def _forget_those_that_train(self) -> None:
        changed = _changed({name: (watched.parameter, watched.before) for name, watched in self._moving.items()})
        for name in changed:
            if self._moving[name].largest_gradient != 0:  # NaN counts: it is reported elsewhere
                del self._moving[name]

    def _check_gradients(self) -> None:
        unreached = [name for name in self._moving if name not in self._reached and not _may_rest(name)]
        if unreached:
            raise TrainingError(
                f"{_tensors(len(unreached))} had no gradient in the first {self.updates} updates: {listing(unreached)}. "
                "A tensor that does not affect the loss is not trained, though weight decay may change it. Freeze it "
                "(model.freeze, or requires_grad_(False) in a model of your own), or see why the model does not use it."
            )
        if self.updates < PATIENCE_UPDATES:
            return
        zero = [name for name, w in self._moving.items() if w.largest_gradient == 0 and not _may_rest(name)]
        if zero:
            raise TrainingError(
                f"{_tensors(len(zero))} had a gradient of exactly zero in the first {self.updates} updates: {listing(zero)}. "
                "Something from there to the loss is zero, or cuts the gradient. Freeze (model.freeze) what should not train."
            )

    def _check_movement(self, at_peak: bool) -> None:
        """Tensors with gradients that have not changed: an error unless rounding explains it."""
        still = {name: watched for name, watched in self._moving.items() if watched.largest_gradient > 0}
        ignored = [name for name, watched in still.items() if not _is_lost_in_rounding(watched)]
        if ignored:
            raise TrainingError(
                f"{_tensors(len(ignored))} had gradients and did not change in the first {self.updates} updates: "
                f"{listing(ignored)}. The optimizer ({type(self.optimizer).__name__}) leaves them as they are."
            )
        if not still or not at_peak:
            return
        some = next(iter(still.values()))
        dtype = str(some.parameter.dtype).removeprefix("torch.")
        eps = torch.finfo(some.parameter.dtype).eps
        line = (
            f"{len(still)} of {self._trainable} trainable tensors had gradients and did not change in the first {self.updates} "
            f"updates: {listing(list(still))}. At a learning rate of {some.group['lr']:.1e} their updates are lost in the "
            f"rounding of {dtype}, in which a number near 1 changes by {eps / 2:.1e} or not at all. "
            "What helps: weights in fp32 (train.precision mixed_bf16 or fp32), or a higher optimizer.learning_rate."
        )
        if len(still) == self._trainable:
            raise TrainingError(line)
        for name in still:
            del self._moving[name]
        self.say(line)


def _may_rest(name: str) -> bool:
    """Whether the tensor belongs to one expert of several, which sees only the tokens that are sent to it."""
    return "experts" in name.split(".")


def _is_lost_in_rounding(watched: _Watched) -> bool:
    """Whether an update of the tensor's rate, or of rate times gradient, is less than its largest weight can show."""
    rate = float(watched.group["lr"])
    update = min(rate, rate * watched.largest_gradient)
    size = float(torch.linalg.vector_norm(watched.parameter.detach(), torch.inf))
    return update < torch.finfo(watched.parameter.dtype).eps * size


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """(at most 8,200,) int64 on the tensor's device: sums of its 64-bit words over equal blocks; a small tensor's words.

    Any one change of the tensor changes it.
    """
    flat = tensor.detach().reshape(-1)
    per_word = 8 // flat.element_size()
    if flat.data_ptr() % 8 or flat.storage_offset() % per_word:
        flat = flat.clone()
    small_integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    whole = flat.numel() // per_word * per_word
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(small_integer)
    block = max(1, -(-words.numel() // WORDS_PER_TENSOR))
    blocks = words.numel() // block
    parts = [words[: blocks * block].view(blocks, block).sum(1), words[blocks * block :], rest.long()]
    return torch.cat(parts)


def _changed(tensors: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """The names of those whose fingerprint is not what it was; the device is waited for once."""
    if not tensors:
        return []
    different = [(fingerprint(tensor) != before).any() for tensor, before in tensors.values()]
    flags: Iterable[bool] = torch.stack([flag.to(different[0].device) for flag in different]).tolist()
    return [name for name, flag in zip(tensors, flags, strict=True) if flag]


def _tensors(count: int, kind: str = "trainable") -> str:
    return counted(count, f"{kind} tensor")
