"""The C allocator tuned for training on a Linux CPU. No torch: it must run before torch is imported.

glibc hands every tensor over 32 MiB back to the kernel when it is freed and faults its pages in again at the next step.
Kept and reused instead, on transparent huge pages, bf16 training of a 30 M model is 1.8 times as fast for 8 % more memory
(measured on 2 AMX cores, torch 2.13).
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def tune_allocator() -> bool:
    """Tune glibc's allocator for this process; True if it was done.

    Does nothing where there is no glibc, where torch is already imported (it would be too late for huge pages), where
    another allocator is preloaded, or with STEEP_TUNE_ALLOCATOR=0.
    """
    if sys.platform != "linux" or "torch" in sys.modules or os.environ.get("STEEP_TUNE_ALLOCATOR") == "0":
        return False
    if os.environ.get("LD_PRELOAD"):  # jemalloc or tcmalloc: the user has chosen
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch: huge pages for big tensors
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 * 2**20))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
