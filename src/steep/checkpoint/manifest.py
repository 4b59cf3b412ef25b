"""What is in a checkpoint: the manifest, written last, without which a checkpoint does not exist. No torch.

A manifest is data from outside: it may be cut short, altered or hostile, so everything read from it is checked and
every fault becomes a CheckpointError that names the file. Two things reveal a change: a manifest must equal its own
canonical form byte for byte, and it carries the fingerprint of the rest of its content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from steep.core.errors import CheckpointError
from steep.core.files import sha256_file
from steep.core.fingerprint import fingerprint

FORMAT = "steep-checkpoint"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LARGEST_JSON_BYTES = 256 << 20  # shards.json of a trillion-parameter model is a few MB: steep writes nothing larger

_NAME = re.compile(r"epoch_(\d{1,18})_step_(\d{1,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FormatTooNewError(CheckpointError):
    """The checkpoint was written by a later steep: it is complete, but this version cannot read it."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and its SHA-256 as hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The head of a checkpoint. `files` has every file but the manifest, by POSIX path relative to the checkpoint."""

    step: int
    """Optimizer updates done."""
    tokens: int
    """Tokens trained on."""
    sequences_seen: int
    """The data state: the next sequence of the sample order."""
    plan_fingerprint: str
    """Of the sample order; a key of the format."""
    world_size: int
    threads: int
    """CPU threads of torch: with another number, a resumed run is not equal bit for bit."""
    torch_version: str
    steep_version: str
    score: float | None
    """Held-out loss that retention compares; lower is better. None if it was not measured."""
    files: dict[str, FileEntry]

    def to_text(self) -> str:
        """The manifest as it is on disk."""
        content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
        content.update({key: value for key, value in vars(self).items() if key != "files"})
        content["files"] = {name: vars(entry) for name, entry in sorted(self.files.items())}
        content["checksum"] = fingerprint(content)
        return canonical_text(content)


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write a file of a checkpoint and fsync it; its entry in the manifest."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def checkpoint_name(epoch: int, step: int) -> str:
    """The folder name of a checkpoint: `epoch_0_step_500`."""
    return f"epoch_{epoch}_step_{step}"


def step_of_name(name: str) -> int | None:
    """The step in a checkpoint's folder name, None if it is not one."""
    match = _NAME.fullmatch(name)
    return int(match[2]) if match else None


def canonical_text(value: Any) -> str:
    """JSON as steep writes it: indented, keys in the order given, no NaN."""
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def read_json_file(path: Path, label: str) -> Any:
    """Parse a JSON file that may be anything. Raises CheckpointError that names it `label`."""
    return parse_json(read_regular_file(path, label), label)


def read_regular_file(path: Path, label: str) -> bytes:
    """The bytes of a regular file (reading a FIFO would block) that is not too large to be steep's. Raises CheckpointError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{label}: is not a plain file")
        if status.st_size > LARGEST_JSON_BYTES:
            raise CheckpointError(f"{label}: {status.st_size:,} bytes is too large for JSON written by steep")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{label}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read ({error.strerror})") from error


def parse_json(data: bytes, label: str) -> Any:
    """JSON text from bytes that may be anything. Raises CheckpointError."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested deeper than the parser can follow
        raise CheckpointError(f"{label}: is not the JSON that steep wrote ({type(error).__name__}: {error})") from error


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, checked as far as possible without reading the other files.

    Raises FormatTooNewError for a later format, CheckpointError naming manifest.json for anything else.
    """
    label = MANIFEST_NAME
    data = read_regular_file(checkpoint / label, label)
    content = parse_json(data, label)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{label}: does not describe a steep checkpoint")
    rest = {key: value for key, value in content.items() if key != "checksum"}
    try:
        unaltered = content.get("checksum") == fingerprint(rest) and canonical_text(content).encode() == data
    except (ValueError, RecursionError):  # NaN, lone surrogates, deep nesting: steep writes none
        unaltered = False
    if not unaltered:
        raise CheckpointError(f"{label}: was altered after it was written (its checksum does not match)")
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatTooNewError(
            f"{checkpoint} has checkpoint format {version}; this version of steep reads up to {FORMAT_VERSION}. "
            "Update steep, or resume from another checkpoint."
        )
    return _manifest_from(content, checkpoint)


def _manifest_from(content: dict[str, Any], checkpoint: Path) -> Manifest:
    label = MANIFEST_NAME
    counts = {key: _count(content, key) for key in ("step", "tokens", "sequences_seen", "world_size", "threads")}
    texts = {key: content.get(key) for key in ("plan_fingerprint", "torch_version", "steep_version")}
    score = content.get("score")
    if not all(isinstance(text, str) for text in texts.values()):
        raise CheckpointError(f"{label}: {', '.join(texts)} must be text")
    if score is not None and (not isinstance(score, float) or not math.isfinite(score)):
        raise CheckpointError(f"{label}: score {score!r} is not a number")
    if not isinstance(content.get("files"), Mapping):
        raise CheckpointError(f"{label}: files is not a mapping")
    files = {name: _entry_from(name, entry, checkpoint) for name, entry in content["files"].items()}
    world_size = counts["world_size"]
    if not 1 <= world_size <= 1_000_000:
        raise CheckpointError(f"{label}: world_size {world_size} is not possible")
    shared = ["config.yaml", "train_state.json", "model/shards.json", "optim/shards.json", "optim/state.json"]
    required = [*shared, *(f"rng/rank_{rank:05d}.json" for rank in range(world_size))]
    if missing := [name for name in required if name not in files]:
        raise CheckpointError(f"{label}: lists no {', '.join(missing)}")
    return Manifest(**counts, **texts, score=score, files=files)  # type: ignore[arg-type]


def _count(content: dict[str, Any], key: str) -> int:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise CheckpointError(f"{MANIFEST_NAME}: {key} is {str(value)[:40]!r}, not a count")
    return value


def _entry_from(name: str, entry: Any, checkpoint: Path) -> FileEntry:
    contained_path(checkpoint, name)
    size, sha256 = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    is_size = type(size) is int and 0 <= size < 2**63  # a bool is an int too
    if not is_size or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CheckpointError(f"{MANIFEST_NAME}: the entry of {name!r} has no size and sha256")
    return FileEntry(size, sha256)  # type: ignore[arg-type]


def contained_path(root: Path, name: Any) -> Path:
    """The file `name` (POSIX, relative) inside `root`. Raises CheckpointError if it would lead out of it."""
    inside = False
    if isinstance(name, str) and name and "\0" not in name and "\\" not in name:
        pure = PurePosixPath(name)
        with suppress(OSError, ValueError, RuntimeError):  # name too long, lone surrogates, symlink loop
            plain = not pure.is_absolute() and ".." not in pure.parts and str(pure) == name
            inside = plain and (root / name).resolve().is_relative_to(root.resolve())
    if not inside:
        raise CheckpointError(f"{name!r} is not the name of a file inside the checkpoint")
    return root / name


def file_problems(checkpoint: Path, manifest: Manifest, *, checksums: bool = True) -> list[str]:
    """What is wrong with the files of a checkpoint, each line naming one; empty when all are as they were written.

    checksums=False looks at presence and size only. Files are hashed in parallel (the interpreter lock is released),
    hard links of one file once: about 0.9 GB/s per core.
    """
    problems: list[str] = []
    to_hash: dict[tuple[int, int], list[str]] = {}
    for name, entry in manifest.files.items():
        identity = _size_problem(checkpoint, name, entry)
        if isinstance(identity, str):
            problems.append(identity)
        else:
            to_hash.setdefault(identity, []).append(name)
    if checksums:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            checked = pool.map(lambda names: _checksum_problems(checkpoint, names, manifest), to_hash.values())
            problems += [problem for found in checked for problem in found]
    return sorted(problems)


def _size_problem(checkpoint: Path, name: str, entry: FileEntry) -> str | tuple[int, int]:
    """A line about a file that is missing or of another size, else the identity of its bytes (device, inode)."""
    try:
        status = contained_path(checkpoint, name).stat()
    except FileNotFoundError:
        return f"{name}: missing"
    except (OSError, CheckpointError) as error:
        return f"{name}: cannot be read ({error})"
    if not stat.S_ISREG(status.st_mode):
        return f"{name}: is not a plain file"
    if status.st_size != entry.size:
        return f"{name}: has {status.st_size:,} bytes, {entry.size:,} were written"
    return status.st_dev, status.st_ino


def _checksum_problems(checkpoint: Path, names: list[str], manifest: Manifest) -> list[str]:
    try:
        found = sha256_file(checkpoint / names[0])
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})" for name in names]
    return [f"{name}: its content was altered (checksum)" for name in names if manifest.files[name].sha256 != found]
