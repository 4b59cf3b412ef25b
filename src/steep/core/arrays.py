"""Arrays written to files. A full disk is an OSError that says so, as for any other write."""

from __future__ import annotations

from typing import IO, Any

import numpy as np


class _NotAFile:
    """Only `write`: given a real file, numpy calls C's fwrite, whose failure is an OSError without its reason."""

    def __init__(self, file: IO[Any]):
        self.write = file.write


def write_array(file: IO[Any], array: np.ndarray) -> None:
    """Write `array` in the format of .npy. Raises OSError, with its errno, where it cannot."""
    np.lib.format.write_array(_NotAFile(file), array, allow_pickle=False)
