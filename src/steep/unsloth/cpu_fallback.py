"""What a notebook asks of the machine, answered also on a machine without a GPU.

Main choice: with CUDA, everything is torch's own. Without it, `torch_here` gives a view of torch (another object;
torch itself stays as it is) whose `cuda` answers the memory questions of notebooks for this process on the CPU: the memory of
the machine, the resident set of the process and its peak. Weakness: a resident set holds Python and its libraries too.
"""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import BatchEncoding

from steep.runtime.device import cpu_name, peak_resident_bytes, resident_bytes, total_memory_bytes
from steep.unsloth.translate import say


def gpu_mem_used() -> str:
    """Memory in use as text, such as "5.02 GB" (2**30 bytes): of the GPU by all processes, the figure of nvidia-smi; without a
    GPU, of this process."""
    used = _used_now()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used = total - free
    return f"{used / 2**30:.2f} GB"


def _used_now(device: Any = None) -> int:
    """Memory that this process uses; its peak so far where the kernel does not say."""
    return resident_bytes() or peak_resident_bytes()


class View(ModuleType):
    """A module as it is, except for some names."""

    def __init__(self, module: ModuleType, answers: dict[str, Any]):
        super().__init__(module.__name__, module.__doc__)
        self._module, self._answers = module, answers

    def __getattr__(self, name: str) -> Any:
        answers = self.__dict__["_answers"]
        return answers[name] if name in answers else getattr(self.__dict__["_module"], name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._module), *self._answers})


def torch_here() -> Any:
    """torch itself with CUDA, else a view of it that answers for the CPU, with a line that says so."""
    return torch if torch.cuda.is_available() else _view_of_torch()


@functools.cache
def _view_of_torch() -> Any:
    say("there is no GPU here: what the notebook asks torch.cuda is answered for this process on the CPU")
    return View(torch, {"cuda": View(torch.cuda, CPU_ANSWERS)})


CPU_ANSWERS: dict[str, Any] = {
    "get_device_properties": lambda device=None: SimpleNamespace(
        name=cpu_name(), total_memory=total_memory_bytes("cpu")
    ),
    "get_device_name": lambda device=None: cpu_name(),
    "memory_allocated": _used_now,
    "memory_reserved": _used_now,
    "max_memory_allocated": lambda device=None: peak_resident_bytes(),
    "max_memory_reserved": lambda device=None: peak_resident_bytes(),
}
"""What a notebook asks torch.cuda about memory, answered for this process and this machine."""


def encodings_stay_here(tokenizer: Any) -> Any:
    """The tokenizer, whose encodings `.to("cuda")` leaves on the CPU where there is no GPU, with a line that says so once.

    The object gets a class of its own, made from its class; the class itself stays as it is.
    """
    if torch.cuda.is_available():
        return tokenizer
    kind = type(tokenizer)

    def encode(self: Any, *arguments: Any, **keywords: Any) -> Any:
        encoding = kind.__call__(self, *arguments, **keywords)
        if type(encoding) is BatchEncoding:
            encoding.__class__ = EncodingHere
        return encoding

    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    tokenizer.__class__ = type(kind.__name__, (kind,), {**named, "__call__": encode})
    return tokenizer


class EncodingHere(BatchEncoding):
    """Inputs on a machine without a GPU."""

    def to(self, device: Any, *arguments: Any, **keywords: Any) -> Any:
        """Move the tensors, in place; "cuda" means the CPU."""
        if str(device).startswith("cuda"):
            _say_once()
            device = "cpu"
        return super().to(device, *arguments, **keywords)


@functools.cache
def _say_once() -> None:
    say('there is no GPU here: inputs.to("cuda") leaves them on the CPU')
