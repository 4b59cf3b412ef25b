"""Which checkpoints are kept and how others are deleted: by step, not by file time, never the one LATEST names. No torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from steep.checkpoint.manifest import Manifest, file_problems, read_manifest, step_of_name
from steep.core.errors import CheckpointError
from steep.core.files import TEMPORARY_PREFIX, remove_leftovers, sync_directory, write_text
from steep.core.say import Say
from steep.runtime.run_directory import read_latest

LATEST = "LATEST"
_REPLACED = "replaced-"


@dataclass(frozen=True)
class Kept:
    """A complete checkpoint that may be kept or deleted."""

    path: Path
    manifest: Manifest


def write_latest(checkpoints: Path, name: str) -> None:
    """Let LATEST name the checkpoint `name`, atomically."""
    write_text(checkpoints / LATEST, name + "\n")


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Folders named like checkpoints, highest step first, whether valid or not."""
    try:
        found = [path for path in checkpoints.iterdir() if step_of_name(path.name) is not None and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda path: (step_of_name(path.name), path.name), reverse=True)


def complete_checkpoints(checkpoints: Path) -> list[Kept]:
    """Checkpoints with a valid manifest and files of the right sizes (checksums are not read), highest step first."""
    complete = []
    for path in checkpoint_folders(checkpoints):
        try:
            manifest = read_manifest(path)
        except CheckpointError:  # a run cannot resume from it: it is neither counted nor deleted
            continue
        if not file_problems(path, manifest, checksums=False):
            complete.append(Kept(path, manifest))
    return sorted(complete, key=lambda kept: kept.manifest.step, reverse=True)


def apply_retention(checkpoints: Path, keep_last: int, keep_best: bool = True) -> list[Path]:
    """Delete all checkpoints except the newest `keep_last`, the one with the lowest score, and the one LATEST names.

    Checkpoints of a later step than LATEST's (left by a run that was resumed from before them) are neither counted nor
    deleted. Nor are folders without a valid manifest. Returns what was deleted. Raises OSError.
    """
    latest = read_latest(checkpoints)
    found = complete_checkpoints(checkpoints)
    limit = next((kept.manifest.step for kept in found if kept.path.name == latest), None)
    candidates = [kept for kept in found if limit is None or kept.manifest.step <= limit]
    keep = {kept.path for kept in candidates[:keep_last]} | {checkpoints / latest if latest else checkpoints}
    scored = [kept for kept in candidates if kept.manifest.score is not None]
    if keep_best and scored:
        keep.add(min(scored, key=lambda kept: (kept.manifest.score, -kept.manifest.step)).path)
    gone = [kept.path for kept in candidates if kept.path not in keep]
    for path in gone:  # first renamed to a temporary name, so that none is ever seen half deleted
        doomed = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-deleted-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
        sync_directory(checkpoints)
        shutil.rmtree(doomed)
    return gone


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished checkpoint into place, replacing one of the same name that an earlier run left.

    A folder cannot be replaced in one rename. After a kill between the two, `collect_leftovers` puts the old one back.
    """
    replaced = final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{_REPLACED}{final.name}")
    had_one = final.exists()
    if had_one:
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_directory(final.parent)
    if had_one:
        shutil.rmtree(replaced)


def collect_leftovers(checkpoints: Path, say: Say) -> None:
    """Remove what killed saves left behind. Only for the process that holds the run's lock."""
    for path in sorted(checkpoints.glob(f"{TEMPORARY_PREFIX}*-{_REPLACED}*")):
        final = checkpoints / path.name.rpartition(_REPLACED)[2]
        if step_of_name(final.name) is not None and not final.exists():
            os.rename(path, final)
            say(f"put back {final.name}, which an interrupted save was replacing")
    for path in remove_leftovers(checkpoints) if checkpoints.is_dir() else []:
        say(f"removed {path.name}, left by an interrupted save")
