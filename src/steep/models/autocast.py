"""What autocast does for the operations it knows, for those it does not."""

from __future__ import annotations

import torch
from torch import Tensor


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of autocast where autocast is on for its device, else as it is."""
    device_type = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else tensor
