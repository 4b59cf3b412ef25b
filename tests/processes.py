"""Runs of the real command that a test watches, signals and kills. Nothing here knows what a test wants to prove."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 180.0
"""A line that has not come after so long will not come: the test fails, whatever the load of the machine."""


class Steep:
    """A started `steep` whose lines can be awaited. A context: whatever happens, the process is gone at the end."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        prepare_child: Callable[[], None] | None = None,
        **environment: str,
    ):
        self.lines: list[tuple[float, str]] = []
        """(seconds since the start, line) of standard output so far."""
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "steep", *map(str, arguments)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare_child,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.errors = ""
        self._queue: queue.Queue[tuple[float, str] | None] = queue.Queue()
        self._readers = [threading.Thread(target=target, daemon=True) for target in (self._read_out, self._read_err)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Steep:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.finish()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put((time.monotonic() - self.started, line.rstrip("\n")))
        self._queue.put(None)

    def _read_err(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line

    def wait_for(self, beginning: str, count: int = 1) -> bool:
        """Return when `count` more lines with this beginning have come; False if the process ended before."""
        while count:
            line = self._queue.get(timeout=PATIENCE_SECONDS)
            if line is None:
                self._queue.put(None)
                return False
            self.lines.append(line)
            count -= line[1].startswith(beginning)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        self.process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """What a terminal does: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_for_error(self, text: str) -> None:
        """Return when standard error holds `text`."""
        end = time.monotonic() + PATIENCE_SECONDS
        while text not in self.errors:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.errors}"
            assert time.monotonic() < end, f"no {text!r} in {self.errors!r}"
            time.sleep(0.01)

    def finish(self, patience_seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the end, take the rest of the output and return the exit code."""
        code = self.process.wait(timeout=patience_seconds)
        for reader in self._readers:
            reader.join(timeout=PATIENCE_SECONDS)
        while not self._queue.empty():
            line = self._queue.get()
            if line is not None:
                self.lines.append(line)
        return code

    @property
    def output(self) -> str:
        """Standard output so far."""
        return "\n".join(line for _, line in self.lines)


@dataclass
class Pace:
    """How long things take in an uninterrupted run, in seconds: where a kill has to aim."""

    start: float
    step: float
    save: float


def measure_pace(finished: Steep) -> Pace:
    """The pace of a run that has ended, from when its lines came."""
    steps = [at for at, line in finished.lines if line.startswith("step ")]
    saving = {line.split()[1]: at for at, line in finished.lines if line.startswith("saving ")}
    saved = {line.split()[1]: at for at, line in finished.lines if line.startswith("saved ")}
    save = sorted(saved[name] - saving[name] for name in saved)
    return Pace(start=steps[0], step=(steps[-1] - steps[0]) / max(1, len(steps) - 1), save=save[len(save) // 2])


@dataclass
class Kills:
    """What became of the killed processes."""

    sent: int = 0
    inside_saves: int = 0
    """Kills after "saving" and before "saved" of the same checkpoint."""
    during_start: int = 0
    """Kills before the first step of their process."""
    left_over: list[str] = field(default_factory=list)
    """Half-written folders that were on disk after a kill."""


def kill_once(
    command: list[str | Path], run: Path, aim: str, pace: Pace, generator: random.Random, kills: Kills
) -> None:
    """Start the run and SIGKILL it at a random instant: inside a save, while starting, or anywhere between steps.

    A kill leaves the run a step or two further, so that a run of three times as many steps as kills outlasts them.
    """
    with Steep(*command) as process:
        if aim == "save" and process.wait_for("saving ", generator.randint(1, 2)):
            time.sleep(generator.uniform(0, 0.9) * pace.save)
        elif aim == "start":
            time.sleep(generator.uniform(0, 1) * pace.start)
        elif process.wait_for("step ", generator.randint(1, 2)):
            time.sleep(generator.uniform(0, 1) * pace.step)
        process.send(signal.SIGKILL)
        code = process.finish()
        assert code == -signal.SIGKILL, (
            f"{aim}: ended with {code} before it was killed\n{process.output}\n{process.errors}"
        )
    words = [line.split()[:2] for line in process.output.split("\n") if line.startswith(("saving ", "saved "))]
    kills.sent += 1
    kills.inside_saves += bool(words) and words[-1][0] == "saving"
    kills.during_start += not any(line.startswith("step ") for _, line in process.lines)
    kills.left_over += [path.name for path in (run / "checkpoints").glob(".partial-*")]


def same_records(run: Path) -> list[dict[str, Any]]:
    """Every record of metrics.jsonl without what a clock or the size of the process decides."""
    clocks = {"tokens_per_second", "mfu", "memory_bytes", "data_wait_seconds", "step_seconds", "eta_seconds", "time"}
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in clocks} for record in records]


def final_weights(run: Path) -> bytes:
    """The bytes of the safetensors file that LATEST names."""
    latest = (run / "checkpoints" / "LATEST").read_text().strip()
    return (run / "checkpoints" / latest / "model" / "consolidated" / "model.safetensors").read_bytes()
