"""Random state: seeded once, restored last."""

from __future__ import annotations

import random


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_determinism(deterministic: bool) -> None:
    """Only deterministic kernels, where asked. Must run before CUDA is initialised to govern cuBLAS as well."""
    import os

    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)
