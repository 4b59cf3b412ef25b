"""The folder of a run: where everything is, and the small files that describe it. Only the first rank writes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steep.core.errors import CheckpointError, DamagedFileError
from steep.core.files import damaged, read_json, read_object, read_text, remove_leftovers, write_json, write_text
from steep.runtime.ranks import Ranks

CHECKPOINT_NAME = re.compile(r"epoch_(\d+)_step_(\d+)")


def read_latest(checkpoints: Path) -> str | None:
    """The name in LATEST; None if there is none or it is not the name of a checkpoint, which could lead elsewhere."""
    try:
        name = read_text(checkpoints / "LATEST")[:200].strip()
    except (OSError, DamagedFileError):
        return None
    return name if CHECKPOINT_NAME.fullmatch(name) else None


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run below `<run.directory>/<run.name>`."""

    path: Path
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def checkpoints(self) -> Path:
        """Holds LATEST and one folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to continue from, complete or not."""
        return any(self.checkpoints.glob("epoch_*_step_*"))

    @contextmanager
    def created(self) -> Iterator[None]:
        """Make the folders, for the run inside. One that fails before it has begun (no `config.yaml`) leaves none that it made.

        Raises CheckpointError where they cannot be made.
        """
        made = self.ranks.from_first(self._create)
        try:
            yield
        except BaseException:
            if made and self.ranks.is_first and not self.config.exists():
                shutil.rmtree(self.path, ignore_errors=True)
                for parent in made[1:]:
                    with suppress(OSError):  # it holds something else by now
                        parent.rmdir()
            raise

    def _create(self) -> list[Path]:
        """Make the folders. Returns the run's own and those above it that were not there; none if the run's was."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.path.mkdir()
            except FileExistsError:
                missing = []
            for folder in (self.checkpoints, self.path / "samples"):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot create the run directory {self.path}: {error.strerror}. "
                "Choose another with --run.directory, or make it writable."
            ) from error
        return missing

    def write(self, name: str, value: Any) -> None:
        """Write one of the run's JSON files."""
        if self.ranks.is_first:
            write_json(self.path / name, value)

    def read(self, name: str) -> dict[str, Any] | None:
        """Read one of the run's JSON files; None if it is not there. Raises DamagedFileError."""
        path = self.path / name
        return read_object(path) if path.exists() else None

    def read_list(self, name: str) -> list[Any]:
        """Read a JSON file that holds a list; empty if it is not there. Raises DamagedFileError."""
        path = self.path / name
        value = read_json(path) if path.exists() else []
        if not isinstance(value, list):
            raise damaged(path, "it does not hold a list")
        return value

    def remove_leftovers(self) -> None:
        """Remove files that a killed process had half written. Needs the run's lock."""
        if self.ranks.is_first:
            for folder in (self.path, self.path / "samples"):
                remove_leftovers(folder)

    def remove(self, name: str) -> None:
        """Remove one of the run's files, if it is there."""
        if self.ranks.is_first:
            (self.path / name).unlink(missing_ok=True)

    def write_sample(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Write the samples of a step as text a person can read."""
        if not self.ranks.is_first:
            return
        parts = [f"## prompt\n\n{prompt}\n\n## continued\n\n{text}\n" for prompt, text in samples]
        write_text(self.path / "samples" / f"step_{step}.md", "\n".join(parts))


def is_run_directory(path: Path) -> bool:
    """Whether `path` looks like the folder of a run."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()
