"""Copying state to host memory, the only part of a save that training waits for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a cache line
Key = TypeVar("Key", bound=Hashable)


class HostStaging(Generic[Key]):
    """One block of host memory that every save of a run is copied into.

    Fresh memory costs a page fault per 4 KiB, about as much as the copy itself, so the block is kept between saves and
    allocated anew only if shapes, dtypes or devices change. It is pinned where tensors are on CUDA: then the copies run
    asynchronously on the current stream, before any later kernel of that stream can change the state.
    Weakness: holds one copy of the state for the whole run. torch rounds pinned blocks up to a power of two.
    """

    def __init__(self) -> None:
        self._layout: tuple[object, ...] | None = None
        self._views: dict[Key, Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    def reserve(self, tensors: Mapping[Key, Tensor]) -> None:
        """Take the memory for `tensors` and touch every page of it, so that the first copy costs no page faults."""
        self._fit(tensors)
        for view in self._views.values():
            view.zero_()

    def _fit(self, tensors: Mapping[Key, Tensor]) -> None:
        layout = tuple((name, tensor.dtype, tensor.shape, tensor.device) for name, tensor in tensors.items())
        if layout != self._layout:
            self._views = {}  # the old block is freed before the new one is taken
            self._views, self._layout = _allocate(tensors), layout

    def copy(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Copies of `tensors` in host memory, valid until the next call. Call `wait` before reading them."""
        self._fit(tensors)
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._views[name].copy_(tensor, non_blocking=tensor.is_cuda)
        self._events = [torch.cuda.current_stream(device).record_event() for device in _cuda_devices(tensors)]
        return dict(self._views)

    def wait(self) -> None:
        """Return when the copies from CUDA devices have arrived. Releases the interpreter lock."""
        for event in self._events:
            event.synchronize()
        self._events = []


def _allocate(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    places, total = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        places[name] = slice(total, total + size)
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(total, dtype=torch.uint8, pin_memory=bool(_cuda_devices(tensors)))
    return {name: block[places[name]].view(tensor.dtype).view(tensor.shape) for name, tensor in tensors.items()}


def _cuda_devices(tensors: Mapping[Key, Tensor]) -> list[torch.device]:
    return sorted({tensor.device for tensor in tensors.values() if tensor.is_cuda}, key=str)
