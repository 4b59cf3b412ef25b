"""What a run leaves behind when it fails: a summary that says so, and an error that a person can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from steep.core.errors import CheckpointError, SteepError, TrainingError
from steep.runtime.run_directory import RunDirectory


@contextmanager
def explained_errors(run: RunDirectory) -> Iterator[None]:
    """Note a failure in summary.json and raise a file error of the run's own files as one that names the remedy.

    A run that was finished or interrupted before keeps its summary until this process has begun to train (see
    `describe_start`): what could not even start has not changed it.
    """
    try:
        yield
    except SteepError as error:
        if not run.path.exists():
            raise _removed(run) from error
        _note(run, str(error))
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first_line = next(iter(str(error).splitlines()), "out of memory")
        explained: SteepError = TrainingError(
            f"the device has not enough memory: {first_line}\n  What helps: a smaller train.micro_batch_size or "
            "train.activation_checkpointing (the result stays the same), a smaller train.loss_chunk_bytes; steep plan shows "
            "what uses the memory, and steep plan --fit what fits."
        )
        _note(run, str(explained))
        raise explained from error
    except BrokenPipeError:  # the reader of standard output is gone; no file of the run
        raise
    except OSError as error:
        reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        explained = TrainingError(
            f"a file could not be read or written: {reason}. The run stops here; the checkpoints in {run.checkpoints} are "
            "complete. Free some space or restore access, then run the same command again to continue."
        )
        if not run.path.exists():
            explained = _removed(run)
        _note(run, str(explained))
        raise explained from error


def _is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch says it in the words of its allocator, as a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _removed(run: RunDirectory) -> SteepError:
    return CheckpointError(
        f"the run directory {run.path} was removed or renamed while the run was writing to it, and its checkpoints with it. "
        "Put it back and run the same command again, or start a new run."
    )


def _note(run: RunDirectory, message: str) -> None:
    with suppress(OSError):  # the disk may be what failed; the error itself is on its way to the terminal
        summary = run.read("summary.json")
        if summary is None or summary.get("status") == "failed":
            run.write("summary.json", {"status": "failed", "error": message})
