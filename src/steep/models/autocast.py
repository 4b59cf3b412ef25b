"""autocast for operations that torch does not include in it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of autocast if autocast is on for its device, else unchanged."""
    device_type = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else tensor
