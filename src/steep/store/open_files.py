"""The number of files a process may hold open: every memory-mapped shard counts as one."""

from __future__ import annotations

import os
import sys

SPARE_FILES = 512


def allow_open_files(num_files: int) -> None:
    """Raise this process's limit so that `num_files` more can be open; the usual 1,024 is too few for a large store.

    Goes no further than the hard limit; beyond that, opening fails with the system's message.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_now() + num_files + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = 2 * needed if hard == resource.RLIM_INFINITY else min(2 * needed, hard)
        if limit > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _open_now() -> int:
    """The number of the next file descriptor: about that many files are open."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor
