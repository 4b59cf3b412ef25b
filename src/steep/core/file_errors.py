"""What the operating system refuses (space, permissions, paths), as an error for a person.

Parts that know what a file is for raise their own errors, which say more. This is for whatever they let pass.
"""

from __future__ import annotations

import errno
import os
import re

from steep.core.errors import FileError, SteepError
from steep.core.files import TEMPORARY_PREFIX

NO_SPACE = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this system allows",
}
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}\d+-(?=[^/]*$)")  # a person knows the name without it
_RUST = re.compile(r"\(os error (\d+)\)")
_NUMPY = re.compile(r"\d+ requested and \d+ written")
_REMEDIES = {
    **dict.fromkeys(NO_SPACE, "Free some space, or choose a folder on another disk, and run the same command again."),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "Change its permissions or those of its folder, or choose another place."
    ),
    errno.EROFS: "Choose a folder that can be written.",
    errno.ENOENT: "Check the path; if it was there, something removed it meanwhile.",
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
        "Choose another path.",
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit on open files: ulimit -n 65536"),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN),
        "Check the disk or the network file system.",
    ),
}
"""By errno: what would work. Others are not explained; they may be defects of steep."""


def explain_file_error(error: Exception) -> FileError | None:
    """The error as one for a person; None if it does not come from the file system."""
    number = _number_of(error)
    if number not in _REMEDIES or isinstance(error, (ConnectionError, SteepError)):
        return None
    given = (getattr(error, "filename", None), getattr(error, "filename2", None))
    names = [os.fsdecode(name) for name in given if isinstance(name, (str, bytes))]
    names = list(dict.fromkeys(_TEMPORARY.sub("", name) for name in names))
    if not names and number not in NO_SPACE and number not in (errno.EMFILE, errno.ENFILE):
        return None
    reason = NO_SPACE.get(number) or os.strerror(number).lower()
    return FileError(f"{' -> '.join(names) or 'a file'}: {reason}. {_REMEDIES[number]}")


def _number_of(error: Exception) -> int:
    """The errno of an error, 0 without one. Two kinds of library keep it in their text only: those in Rust (safetensors,
    tokenizers), and numpy's `tofile`, which tells how much it wrote before the disk was full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _RUST.search(str(error))
    if found is not None:
        return int(found[1])
    return errno.ENOSPC if isinstance(error, OSError) and _NUMPY.fullmatch(str(error)) else 0
