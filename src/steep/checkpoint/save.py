"""State -> a checkpoint on disk, complete or absent, while training goes on.

The caller waits only for the copy to host memory. A background thread writes everything under a temporary name,
fsyncs, writes the manifest last, renames, then moves LATEST and deletes what retention does not keep. One save is in
flight at a time. A kill at any instant leaves the previous checkpoints and at most a temporary folder beside them.

With several ranks, saving has two phases. The first rank names the temporary folder, each rank writes its files there and
reports them or its error, and the first rank adds the manifest and publishes, if no rank failed.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from steep.checkpoint.consolidate import NO_SPACE
from steep.checkpoint.finite import not_finite
from steep.checkpoint.folder import CheckpointState, RankFiles, finish_folder, make_folder, size_of, write_rank_files
from steep.checkpoint.manifest import step_of_name
from steep.checkpoint.retention import apply_retention, collect_leftovers, complete_checkpoints, publish, write_latest
from steep.checkpoint.staging import HostStaging
from steep.core.errors import CheckpointError
from steep.core.files import free_bytes, temporary_path
from steep.core.say import Say, say_nothing
from steep.core.units import format_bytes, format_seconds
from steep.runtime.ranks import Ranks

SMALL_FILES_BYTES = 64 << 20  # what is asked of the disk beyond the tensors: tokenizer, JSON, directories

Result = TypeVar("Result")
Explain = Callable[[Exception], str]


class CheckpointWriter:
    """Saves checkpoints into one folder, `runs/<name>/checkpoints`. Needs the run's lock (see `RunLock`).

    ranks: every rank makes a writer and calls the same methods in the same order. They talk from the writing thread, so
    nothing else may use this value for talking meanwhile. keep_last, keep_best: see `apply_retention`; keep_last=None
    keeps all. on_event is given lines for the console on the first rank, also from the writing thread. Making a writer
    also removes what killed saves left.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        asynchronous: bool = True,
        *,
        ranks: Ranks = Ranks(),
        keep_last: int | None = None,
        keep_best: bool = True,
        on_event: Say = say_nothing,
    ):
        self.directory = Path(directory)
        self.asynchronous = asynchronous
        self._ranks, self._keep_last, self._keep_best = ranks, keep_last, keep_best
        self._on_event = on_event if ranks.is_first else say_nothing
        self._staging: HostStaging[Hashable] = HostStaging()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        _on_first_rank(ranks, self._prepare_directory, str)

    def reserve(self, state: CheckpointState) -> None:
        """Take host memory for states like `state` now, in the background, so that the first save is as short as the others.

        Call it once, after the first step, when the optimizer has its state. Does nothing for a synchronous writer.
        """
        self.wait()
        if self.asynchronous:
            self._in_flight = self._pool.submit(self._staging.reserve, _tensors(state))

    def save(self, name: str, state: CheckpointState) -> None:
        """Save `state` as checkpoint `name` (see `checkpoint_name`); returns when it may be changed again.

        Waits for a save that is still in flight. Raises CheckpointError if that save failed, or at once if the disk does not
        have room for this one.
        """
        start = time.perf_counter()
        if step_of_name(name) is None:
            raise CheckpointError(f"{name!r} is not a checkpoint's name; it must be like epoch_0_step_500")
        self.wait()
        size = self._bytes_needed(state)
        _on_first_rank(self._ranks, partial(self._check_space, size), str)
        self._on_event(f"saving {name}")
        state = replace(state, train_state=copy.deepcopy(dict(state.train_state)))  # the loop goes on changing it
        if self.asynchronous:
            staged = self._staging.copy(_tensors(state))
            model = [replace(piece, tensor=staged["model", piece.name, piece.offset]) for piece in state.model]
            optimizer = [replace(piece, tensor=staged["optim", piece.name, piece.offset]) for piece in state.optimizer]
            state = replace(state, model=model, optimizer=optimizer)
        self._in_flight = self._pool.submit(self._write, name, state, start, size)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when no save is in flight. Raises CheckpointError if it failed; the error is raised once."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def raise_failure(self) -> None:
        """Raise the CheckpointError of a save that has failed by now; does not wait for a save in flight.

        Several ranks would notice a failure at different steps, so for them the next `save` or `wait` raises it.
        """
        if self._ranks.world == 1 and self._in_flight is not None and self._in_flight.done():
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
            collect_leftovers(self.directory, self._on_event)
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written to {self.directory}: {error.strerror}") from error

    def _bytes_needed(self, state: CheckpointState) -> int:
        """Bytes of all ranks' tensors. The consolidated weights of several ranks are a copy."""
        copies = 1 if self._ranks.world == 1 else 2
        return sum(self._ranks.gather(copies * size_of(state.model) + size_of(state.optimizer)))

    def _check_space(self, size: int) -> None:
        needed = size + SMALL_FILES_BYTES
        available = free_bytes(self.directory)
        if available is not None and available < needed:
            raise self._disk_full(needed, available)

    def _disk_full(self, needed: int, available: int | None, detail: str = "") -> CheckpointError:
        earlier = complete_checkpoints(self.directory)
        good = f"last good checkpoint: {earlier[0].path}" if earlier else "there is no earlier checkpoint"
        had = "unknown" if available is None else format_bytes(available)
        return CheckpointError(
            f"disk full: needed {format_bytes(needed)}, had {had} in {self.directory}{detail}; {good}. "
            "Free some space or lower checkpoint.keep_last, then resume."
        )

    def _write(self, name: str, state: CheckpointState, start: float, size: int) -> None:
        ranks, temporary = self._ranks, temporary_path(self.directory / name)
        explain = partial(self._explain, name, size + SMALL_FILES_BYTES, free_bytes(self.directory))
        try:
            with ranks.phase(f"saving {name}"):
                root = _on_first_rank(ranks, lambda: make_folder(temporary), explain)
                written = _on_every_rank(ranks, lambda: self._write_own_files(root, state), explain)
                _on_first_rank(ranks, lambda: self._publish(name, root, state, written), explain)
        except Exception:
            if ranks.is_first:  # what cannot be removed now is collected when the run starts again
                with suppress(OSError):
                    shutil.rmtree(temporary)
            raise
        seconds = format_seconds(time.perf_counter() - start)
        self._on_event(f"saved {name} ({format_bytes(size)}) in {seconds}")

    def _write_own_files(self, root: Path, state: CheckpointState) -> RankFiles:
        self._staging.wait()
        pieces = (*state.model, *state.optimizer)
        if found := not_finite((piece.name, piece.tensor) for piece in pieces):
            earlier = complete_checkpoints(self.directory)
            good = f"the run can go on from {earlier[0].path}" if earlier else "there is no earlier checkpoint"
            raise CheckpointError(
                f"not saved, since the run has diverged: at step {state.step} there is NaN or infinity in {found}; {good}. What "
                "helps: a lower optimizer.learning_rate, train.on_spike rollback, train.precision fp32."
            )
        return write_rank_files(root, self._ranks.rank, state)

    def _publish(self, name: str, root: Path, state: CheckpointState, written: list[RankFiles]) -> None:
        finish_folder(root, state, written)
        publish(root, self.directory / name)
        write_latest(self.directory, name)
        if self._keep_last is not None:
            apply_retention(self.directory, self._keep_last, self._keep_best)

    def _explain(self, name: str, needed: int, available: int | None, error: Exception) -> str:
        if isinstance(error, CheckpointError):
            return str(error)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return str(self._disk_full(needed, available, f" ({error.strerror})"))
        return f"saving {name} failed: {error}. Earlier checkpoints are untouched."


def _tensors(state: CheckpointState) -> dict[Hashable, Tensor]:
    """All tensors of this rank by part, name and offset."""
    parts = {"model": state.model, "optim": state.optimizer}
    return {(part, piece.name, piece.offset): piece.tensor for part, pieces in parts.items() for piece in pieces}


def _on_every_rank(ranks: Ranks, work: Callable[[], Result], explain: Explain) -> list[Result]:
    """What `work` gives on each rank, on every rank. If it fails on any, all raise the same CheckpointError."""
    result, text, error = _attempt(work, explain)
    reports = ranks.gather((result, text))
    for rank, (_, text) in enumerate(reports):
        if text is not None:
            text = text if ranks.world == 1 else f"rank {rank}: {text}"
            raise _failure(text, error if rank == ranks.rank else None)
    return [result for result, _ in reports]  # type: ignore[misc]


def _on_first_rank(ranks: Ranks, work: Callable[[], Result], explain: Explain) -> Result:
    """What `work` gives on the first rank, on every rank. If it fails, all raise the same CheckpointError."""
    result, text, error = _attempt(work, explain) if ranks.is_first else (None, None, None)
    result, text = ranks.broadcast((result, text))
    if text is not None:
        raise _failure(text, error)
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], Result], explain: Explain) -> tuple[Result | None, str | None, Exception | None]:
    try:
        return work(), None, None
    except Exception as error:  # noqa: BLE001 - sent to all ranks: one that raised alone would leave the others waiting
        return None, explain(error), error


def _failure(text: str, cause: Exception | None) -> Exception:
    """What to raise for `text`; on the rank at fault a program error comes as it is."""
    if cause is not None and not isinstance(cause, (OSError, CheckpointError)):
        return cause
    failure = CheckpointError(text)
    failure.__cause__ = cause
    return failure
