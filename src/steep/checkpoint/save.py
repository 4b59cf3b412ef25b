"""State -> a checkpoint on disk, whole or absent, while training goes on.

The caller waits for the copy to host memory only. A background thread writes everything under a temporary name,
fsyncs, writes the manifest last, renames, then moves LATEST and lets retention delete. One save is in flight at a time.
Killed at any instant, the folder holds the previous checkpoints and at most a temporary folder beside them.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steep
from steep.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, canonical_text, contained_path, step_of_name
from steep.checkpoint.retention import apply_retention, collect_leftovers, publish, whole_checkpoints, write_latest
from steep.checkpoint.safetensors_writer import DTYPE_NAMES, write_safetensors
from steep.checkpoint.staging import HostStaging
from steep.core.errors import CheckpointError
from steep.core.files import sha256_file, sync_directory, temporary_path
from steep.core.units import format_bytes, format_seconds

RANK_FILE = "rank_00000.safetensors"
CONSOLIDATED_FILE = "model.safetensors"
SMALL_FILES_BYTES = 64 << 20  # what is asked of the disk beyond the tensors: tokenizer, JSON, directories
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, quota, file size limit


@dataclass(frozen=True)
class CheckpointState:
    """Everything a run needs to go on, between two steps. Tensors are the live ones: `save` copies them."""

    model_tensors: Mapping[str, Tensor]
    optimizer_tensors: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Any]
    rng: Mapping[str, Any]
    config_yaml: str
    step: int
    tokens: int
    sequences_seen: int
    plan_fingerprint: str
    train_state: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the loop wants back, as JSON."""
    hf_files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that make model/consolidated loadable by transformers, by name: see `huggingface_files`."""
    weights_file: str = CONSOLIDATED_FILE
    """What transformers or peft call the file of the weights in model/consolidated."""
    score: float | None = None
    """Held-out loss for retention; lower is better."""

    def size(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.model_tensors.values(), *self.optimizer_tensors.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class CheckpointWriter:
    """Saves checkpoints into one folder, `runs/<name>/checkpoints`. Needs the run's lock (see `RunLock`).

    keep_last, keep_best: see `apply_retention`; keep_last=None keeps all. on_event is given lines for the console,
    also from the writing thread. Making a writer also removes what killed saves left.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        asynchronous: bool = True,
        *,
        keep_last: int | None = None,
        keep_best: bool = True,
        on_event: Callable[[str], None] = lambda text: None,
    ):
        self.directory = Path(directory)
        self.asynchronous = asynchronous
        self.stopped_seconds = 0.0
        """How long the last `save` kept its caller waiting, an earlier save's rest included."""
        self._keep_last, self._keep_best, self._on_event = keep_last, keep_best, on_event
        self._staging: HostStaging[tuple[str, str]] = HostStaging()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._prepare_directory()

    def reserve(self, state: CheckpointState) -> None:
        """Take host memory for states like `state` now, in the background, so that the first save is as short as others.

        To be called once, after the first step, when the optimizer has its state. Does nothing for a synchronous writer.
        """
        self.wait()
        if self.asynchronous:
            self._in_flight = self._pool.submit(self._staging.reserve, _by_part(state))

    def save(self, name: str, state: CheckpointState) -> None:
        """Save `state` as checkpoint `name` (see `checkpoint_name`); returns when it may be changed again.

        Waits for a save that is still in flight. Raises CheckpointError if that one failed, or at once if the disk has
        no room for this one.
        """
        start = time.perf_counter()
        if step_of_name(name) is None:
            raise CheckpointError(f"{name!r} is not a checkpoint's name; it must be like epoch_0_step_500")
        self.wait()
        self._check_space(state)
        self._on_event(f"saving {name}")
        state = replace(state, train_state=copy.deepcopy(dict(state.train_state)))  # the loop goes on changing it
        if self.asynchronous:
            staged = self._staging.copy(_by_part(state))
            state = replace(
                state,
                model_tensors={n: staged["model", n] for n in state.model_tensors},
                optimizer_tensors={n: staged["optim", n] for n in state.optimizer_tensors},
            )
        self._in_flight = self._pool.submit(self._write, name, state, start)
        if not self.asynchronous:
            self.wait()
        self.stopped_seconds = time.perf_counter() - start

    def wait(self) -> None:
        """Return when no save is in flight. Raises CheckpointError if it failed; the error is raised once."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def raise_failure(self) -> None:
        """Raise the CheckpointError of a save that has failed by now; does not wait for one that is still in flight."""
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def close(self) -> None:
        """Finish the save in flight and end the thread. Raises CheckpointError if the save failed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prepare_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for message in collect_leftovers(self.directory):
                self._on_event(message)
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written to {self.directory}: {error.strerror}") from error

    def _check_space(self, state: CheckpointState) -> None:
        needed = state.size() + SMALL_FILES_BYTES
        available = self._available()
        if available is not None and available < needed:
            raise self._disk_full(needed, available)

    def _available(self) -> int | None:
        """Free bytes on the disk; None while the folder cannot be asked (the write itself will say why)."""
        try:
            return shutil.disk_usage(self.directory).free
        except OSError:
            return None

    def _disk_full(self, needed: int, available: int | None, detail: str = "") -> CheckpointError:
        whole = whole_checkpoints(self.directory)
        good = f"last good checkpoint: {whole[0].path}" if whole else "there is no earlier checkpoint"
        had = "unknown" if available is None else format_bytes(available)
        return CheckpointError(
            f"disk full: needed {format_bytes(needed)}, had {had} in {self.directory}{detail}; {good}. "
            "Free some space or lower checkpoint.keep_last, then resume."
        )

    def _write(self, name: str, state: CheckpointState, start: float) -> None:
        self._staging.wait()
        temporary = temporary_path(self.directory / name)
        available = self._available()
        try:
            _write_folder(temporary, state)
            publish(temporary, self.directory / name)
            write_latest(self.directory, name)
            if self._keep_last is not None:
                apply_retention(self.directory, self._keep_last, self._keep_best)
        except OSError as error:
            _remove(temporary)
            raise self._explain(error, name, state, available) from error
        except BaseException:
            _remove(temporary)
            raise
        seconds = format_seconds(time.perf_counter() - start)
        self._on_event(f"saved {name} ({format_bytes(state.size())}) in {seconds}")

    def _explain(self, error: OSError, name: str, state: CheckpointState, available: int | None) -> CheckpointError:
        if error.errno in _NO_SPACE:
            return self._disk_full(state.size() + SMALL_FILES_BYTES, available, f" ({error.strerror})")
        return CheckpointError(f"saving {name} failed: {error}. Earlier checkpoints are untouched.")


def _by_part(state: CheckpointState) -> dict[tuple[str, str], Tensor]:
    """All tensors under one roof: ("model" or "optim", name)."""
    model = {("model", name): tensor for name, tensor in state.model_tensors.items()}
    return model | {("optim", name): tensor for name, tensor in state.optimizer_tensors.items()}


def _remove(temporary: Path) -> None:
    """Remove a half-written folder; what cannot be removed now is collected when the run starts again."""
    with suppress(OSError):
        shutil.rmtree(temporary)


def _write_folder(root: Path, state: CheckpointState) -> None:
    """Write every file of a checkpoint into the new folder `root`, the manifest last, all fsynced."""
    if root.exists():
        shutil.rmtree(root)
    root.mkdir()  # without its parents: a run directory that was removed meanwhile is not made again
    for folder in ("model/consolidated", "optim", "rng"):
        (root / folder).mkdir(parents=True)
    files = _write_tensors(root, "model", state.model_tensors) | _write_tensors(root, "optim", state.optimizer_tensors)
    files |= _write_consolidated(root, state, files[f"model/{RANK_FILE}"])
    small = {
        "config.yaml": state.config_yaml,
        "train_state.json": canonical_text(dict(state.train_state)),
        "rng/rank_00000.json": canonical_text(dict(state.rng)),
        "optim/state.json": canonical_text(dict(state.optimizer_state)),
    }
    files |= {name: _write_bytes(root / name, text.encode("utf-8")) for name, text in small.items()}
    _sync_folders(root)
    _write_bytes(root / MANIFEST_NAME, _manifest(state, files).to_text().encode("utf-8"))
    sync_directory(root)


def _manifest(state: CheckpointState, files: dict[str, FileEntry]) -> Manifest:
    score = None if state.score is None or state.score != state.score else float(state.score)
    return Manifest(
        step=state.step,
        tokens=state.tokens,
        sequences_seen=state.sequences_seen,
        plan_fingerprint=state.plan_fingerprint,
        world_size=1,
        threads=torch.get_num_threads(),
        torch_version=str(torch.__version__),
        steep_version=steep.__version__,
        score=score,
        files=files,
    )


def _write_tensors(root: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, FileEntry]:
    """The tensors of this rank, and shards.json that says where each lies in its global tensor."""
    name = f"{part}/{RANK_FILE}"
    entry = write_safetensors(root / name, tensors, {"format": "pt"})
    index = {
        key: {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "shards": [{"file": RANK_FILE, "offset": [0] * tensor.dim(), "shape": list(tensor.shape)}],
        }
        for key, tensor in sorted(tensors.items())
    }
    shards = canonical_text({"tensors": index}).encode("utf-8")
    return {name: entry, f"{part}/shards.json": _write_bytes(root / part / "shards.json", shards)}


def _write_consolidated(root: Path, state: CheckpointState, weights: FileEntry) -> dict[str, FileEntry]:
    """The folder that transformers loads. One rank's file holds the whole model: a hard link costs nothing."""
    folder = "model/consolidated"
    name = f"{folder}/{state.weights_file}"
    _link_or_copy(root / "model" / RANK_FILE, root / name)
    files = {name: weights}
    for file, data in state.hf_files.items():
        path = contained_path(root / folder, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        files[f"{folder}/{file}"] = _write_bytes(path, data)
    return files


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise
        shutil.copyfile(source, target)  # file systems without hard links
        with open(target, "rb+") as file:
            os.fsync(file.fileno())
        if sha256_file(target) != sha256_file(source):
            raise OSError(errno.EIO, "the copy differs from what was written", str(target)) from error


def _write_bytes(path: Path, data: bytes) -> FileEntry:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _sync_folders(root: Path) -> None:
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        sync_directory(folder)
