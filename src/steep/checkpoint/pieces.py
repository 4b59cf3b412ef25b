"""State out of a model and its optimizer by name, and back in, strictly; random number generators too.

Names are the model's own parameter names, those of the Hugging Face checkpoint. What `torch.compile` and activation
checkpointing put into a name is taken out again, so that a run may be resumed with another choice of them.
State goes out as pieces, the parts of global tensors that a rank holds. In one process each is a whole tensor.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steep.core.errors import CheckpointError
from steep.core.units import counted, listing
from steep.models.adapters import adapter_tensors
from steep.models.layers import has_adapter, plain_name

if TYPE_CHECKING:
    from steep.checkpoint.load import Checkpoint

IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable", "differentiable")
"""Keys of a parameter group that say how an update is computed, not which: they are the resuming run's own."""


@dataclass(frozen=True)
class Piece:
    """The part of a global tensor that this rank holds and saves: a box of the shape of `tensor` at `offset`."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    """The live tensor, not a copy."""


@dataclass(frozen=True)
class Pieces:
    """This rank's state by name. No element is in the pieces of two ranks."""

    model: tuple[Piece, ...]
    optimizer: tuple[Piece, ...]
    """Named `<parameter name>.<state key>`, e.g. `model.norm.weight.exp_avg`; state that is a number is in optimizer_state."""
    optimizer_state: dict[str, Any]
    """JSON: the optimizer's class, its parameter groups with parameter names, state that is not a tensor."""


def take_pieces(model: nn.Module, optimizer: torch.optim.Optimizer) -> Pieces:
    """The state of `model` and `optimizer` between two steps. Raises CheckpointError for a parameter without a name."""
    names = _parameter_names(model, optimizer)
    tensors, values = {}, {}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        tensors.update({f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)})
        rest = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        values.update({name: rest} if rest else {})
    groups = [_group_to_json(group, names) for group in optimizer.param_groups]
    document = {"class": type(optimizer).__name__, "param_groups": groups, "state": values}
    return Pieces(whole_pieces(model_tensors(model)), whole_pieces(tensors), document)


def whole_pieces(tensors: Mapping[str, Tensor]) -> tuple[Piece, ...]:
    """A piece per tensor, which holds all of it."""
    return tuple(Piece(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in tensors.items())


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, as transformers saves them; of a model with an adapter only
    what is trained, under the names of peft's adapter files."""
    if has_adapter(model):
        return adapter_tensors(model)
    tensors = {plain_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            tensors[plain_name(name)] = buffer.detach()
    return tensors


def restore(model: nn.Module, optimizer: torch.optim.Optimizer | None, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into `model` and `optimizer`, in place, bit for bit; nothing is changed on an error.

    Raises CheckpointError naming every tensor, shape, dtype, parameter group and setting that differs.
    Random number generators are not touched: call `restore_rng` after everything that draws from them.
    """
    saved = checkpoint.model_tensors()
    current = model_tensors(model)
    problems = tensor_differences(saved, current)
    if optimizer is not None:
        names = _parameter_names(model, optimizer)
        saved_optimizer = checkpoint.optimizer_tensors()
        problems += _optimizer_differences(optimizer, names, checkpoint.optimizer_state, set(saved_optimizer))
    if problems:
        raise CheckpointError(f"{checkpoint.path} does not fit this run:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[name])
    if optimizer is not None:
        _restore_optimizer(optimizer, names, checkpoint.optimizer_state, saved_optimizer)


def tensor_differences(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> list[str]:
    """Which names, shapes and dtypes differ, one line each; at most ten names per kind."""
    lines = []
    if missing := [name for name in current if name not in saved]:
        lines.append(f"in the model but not in the checkpoint: {listing(missing)}")
    if unexpected := [name for name in saved if name not in current]:
        lines.append(f"in the checkpoint but not in the model: {listing(unexpected)}")
    for name in (name for name in current if name in saved):
        was, now = saved[name], current[name]
        if was.shape != now.shape or was.dtype != now.dtype:
            lines.append(f"{name}: saved as {_kind(was)}, now {_kind(now)}")
    return lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else [])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    nameless = [p for group in optimizer.param_groups for p in group["params"] if p not in names]
    if nameless:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in nameless[:5])
        raise CheckpointError(f"the optimizer updates {counted(len(nameless), 'tensor')} not in the model: {shapes}")
    return names


def _group_to_json(group: dict[str, Any], names: dict[Tensor, str]) -> dict[str, Any]:
    settings = {key: _plain(value) for key, value in group.items() if key != "params"}
    return {"params": [names[parameter] for parameter in group["params"]], **settings}


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back: tensors as numbers, tuples as lists."""
    if isinstance(value, Tensor):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _optimizer_differences(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], saved: dict[str, Any], saved_tensors: set[str]
) -> list[str]:
    current = [_group_to_json(group, names) for group in optimizer.param_groups]
    groups = saved["param_groups"]
    if saved["class"] != type(optimizer).__name__:
        return [f"optimizer: saved from {saved['class']}, now {type(optimizer).__name__}"]
    if len(groups) != len(current):
        return [f"optimizer: {len(groups)} parameter groups saved, now {len(current)}"]
    lines = [line for i, pair in enumerate(zip(groups, current, strict=True)) for line in _group_differences(i, *pair)]
    known = {name for group in current for name in group["params"]}
    unknown = sorted(name for name in saved_tensors if name.rpartition(".")[0] not in known)
    return lines + ([f"optimizer: state of tensors that it does not update: {listing(unknown)}"] if unknown else [])


def _group_differences(number: int, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    lines = []
    if saved["params"] != current["params"]:
        moved = sorted(set(saved["params"]) ^ set(current["params"])) or ["the same tensors in another order"]
        lines.append(f"optimizer group {number} holds other tensors: {listing(moved)}")
    settings = sorted((saved.keys() | current.keys()) - {"params", "lr", *IMPLEMENTATION_KEYS})
    changed = [key for key in settings if saved.get(key) != current.get(key)]
    return lines + [f"optimizer group {number}: {k} was {saved.get(k)!r}, is now {current.get(k)!r}" for k in changed]


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], saved: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Not through `load_state_dict`, which casts fp32 state to the dtype of a bf16 parameter."""
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in saved["state"].items()}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        by_name.setdefault(name, {})[key] = tensor
    optimizer.state.clear()
    for group, was in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(was["lr"])
        else:
            group["lr"] = was["lr"]
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            if names[parameter] in by_name:
                state = by_name[names[parameter]]
                optimizer.state[parameter] = {k: _placed(k, v, parameter, on_device) for k, v in state.items()}


def _placed(key: str, value: Any, parameter: Tensor, steps_on_device: bool) -> Any:
    """A copy, where torch.optim expects it. The saved tensor is a view of the file."""
    if not isinstance(value, Tensor):
        return value
    device = parameter.device if key != "step" or steps_on_device else torch.device("cpu")
    return torch.empty(value.shape, dtype=value.dtype, device=device).copy_(value)


def capture_rng() -> dict[str, Any]:
    """The state of every generator that training can draw from, as JSON: torch, the CUDA device in use, python, numpy."""
    import numpy as np

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    # of the device that this process trains on, no other
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
        "python": [version, list(words), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],  # type: ignore[arg-type]
    }


def restore_rng(saved: Mapping[str, Any]) -> None:
    """Set every generator to what `capture_rng` saw. Raises CheckpointError for anything else."""
    import numpy as np

    try:
        version, words, gauss = saved["python"]
        name, keys, position, has_gauss, cached = saved["numpy"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(_state_tensor(saved["torch"]))
        if torch.cuda.is_available() and saved["cuda"]:
            torch.cuda.set_rng_state(_state_tensor(saved["cuda"][0]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"rng: the saved state of the random number generators is unusable ({error})") from error


def _state_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
