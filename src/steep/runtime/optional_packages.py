"""Packages that transformers and peft import wherever they are installed, whether or not a run uses them. No torch.

Main choice: a process that runs one command leaves those out that the command does not use, and says so to Python itself: None in
`sys.modules` is the language's own mark of a module that cannot be imported (The Python Language Reference, 5.3.1). A notebook's
process is its owner's, where a later cell may use them; there only the noise of their import is kept away.

So `steep.train` called from Python imports torchao wherever it is installed: transformers' modeling_utils imports all quantizers,
and quantizers/quantizer_torchao.py imports torchao at its top. peft/helpers.py imports bitsandbytes in the same way, so only runs
with an adapter do. Both ask importlib whether the package is there and have no switch; the only other way is to patch them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

OPTIONAL_PACKAGES = ("bitsandbytes", "torchao")

NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Logger -> a part of what it says when a package is imported: kernels for other hardware, and a coming change inside torch."""


def leave_out_packages(used: Collection[str], torch: bool = True) -> None:
    """Let this process find none of OPTIONAL_PACKAGES but those `used`. Does nothing once torch is imported.

    torch: False leaves torch out as well. transformers' tokenizers are then the same, from the same code, without the 2 seconds
    that its configurations take to import torch.
    """
    if "torch" in sys.modules:
        return
    for name in OPTIONAL_PACKAGES if torch else (*OPTIONAL_PACKAGES, "torch"):
        if name not in used:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if not torch:
        os.environ.setdefault(
            "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
        )  # it would say that there are no models without torch


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Inside, importing an optional package says nothing of NOISE; everything else is said as always."""
    loggers = {name: logging.getLogger(name) for name in NOISE}
    for logger in loggers.values():
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers.values():
            logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return NOISE[record.name] not in record.getMessage()
