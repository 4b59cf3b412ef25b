"""Which code this user has trained with on this machine, so that a run's configuration may name it again when the run is read.

In: the target of a run's model. Out: whether training here has called the same one, from a source file with the same content. A
run's config.yaml may come from a stranger, so training notes what it ran in a folder of the user's own; each note is named after
a keyed digest (HMAC-SHA256) of the target, its arguments and its files, so that nobody without the key can write one. Weakness:
it does not guard against who can write as this user, nor does it see what a noted file imports.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Optional

from steep.core.cache_directory import default_cache_directory
from steep.core.errors import ConfigError, FileError
from steep.core.files import sha256_file, temporary_path
from steep.core.say import Say
from steep.core.section import Target
from steep.core.targets.building import check
from steep.core.targets.finding import absolute, find_targets, split_file

KEY_BYTES = 32


def note_trained(target: Target, say: Say) -> None:
    """Remember that training here calls this target. Where that cannot be written down, say so: the run itself needs no note."""
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = _read_key(folder) or _make_key(folder)
        (folder / _digest(target, key)).touch(mode=0o600)
    except (OSError, FileError) as error:
        say(
            f"not remembered that {target.target} was trained with here ({error}), so generate, evaluate, export and chat will "
            "ask for --allow-code"
        )


def code_is_allowed(target: Target, config_file: Optional[Path], allow_code: Optional[bool] = None) -> bool:
    """Whether a target that was read back from a run may run code, beyond what `--no-code` allows.

    allow_code: what the user has said; None, nothing: it may if training here has run it. Raises ConfigError where it may not and
    `--no-code` would refuse it, before anything of it is imported.
    """
    if allow_code is not None:
        return allow_code
    if _was_trained_here(target):
        return True
    try:
        check(target, allow_code=False, location="model")
    except ConfigError as error:
        files = [str(absolute(file[0])) for _, part in find_targets(target) if (file := split_file(part.target))]
        named = f" ({', '.join(files)})" if files else ""
        raise ConfigError(
            f"{config_file or 'the configuration'} names code that builds its model: {target.target}{named}. No training of this "
            "user on this machine has run exactly that, so it was not run. Look at it; if you trust it, --allow-code (in Python "
            f"allow_code=True) runs it.\n  {error}"
        ) from None
    return False


def _was_trained_here(target: Target) -> bool:
    try:
        folder = _folder()
        key = _read_key(folder)
        return key is not None and (folder / _digest(target, key)).is_file()
    except (OSError, FileError):  # a folder that cannot be read remembers nothing; the user is asked
        return False


def _folder() -> Path:
    return default_cache_directory() / "trained_here" / f"user_{os.getuid()}"


def _read_key(folder: Path) -> Optional[bytes]:
    """The user's key; None where there is none that only this user can have read and written."""
    path = folder / "key"
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    key = path.read_bytes() if is_own else b""
    return key if len(key) == KEY_BYTES else None


def _make_key(folder: Path) -> bytes:
    """A new key, complete at once; that of another process that was faster, if it is a good one."""
    path, temporary = folder / "key", temporary_path(folder / "key")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)  # unlike a rename it replaces none
    if _read_key(folder) is None:
        os.replace(temporary, path)  # others could read what was there
    temporary.unlink(missing_ok=True)
    key = _read_key(folder)
    if key is None:
        raise FileError(f"{path} cannot be kept from other users")
    return key


def _digest(target: Target, key: bytes) -> str:
    """The name of a target's note. A file counts by its content: where it lies may change."""
    files = [file[0] for _, part in find_targets(target) if (file := split_file(part.target))]
    content = {
        "target": target.model_dump(mode="json", by_alias=True),
        "files": {file: sha256_file(absolute(file)) for file in files},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hmac.new(key, text.encode("ascii"), hashlib.sha256).hexdigest()
