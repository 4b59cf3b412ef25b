"""Run work items on worker processes. If one dies, all end with its reason; nothing hangs.

Workers have their own session: Ctrl-C reaches only the parent, which kills them and leaves a folder that can be continued.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Optional

from steep.core import errors
from steep.core.child import module_path
from steep.core.errors import DataError, SteepError
from steep.store.shard_work import Preparation
from steep.store.work import WorkItem

_START = "import sys; sys.path[:] = sys.argv[1:]; from steep.store.worker import main; main()"

OnProgress = Callable[[int, int, int], None]
"""Called with item number, bytes read and tokens written of that item."""

_Event = tuple["_Worker", Optional[dict[str, Any]]]


def run_items(preparation: Preparation, items: list[WorkItem], workers: int, on_progress: OnProgress) -> None:
    """Process `items` on `workers` processes. Raises what a worker raised, or DataError when one was killed."""
    events: queue.Queue[_Event] = queue.Queue()
    waiting = list(reversed(items))
    running: list[_Worker] = []
    try:
        for _ in range(min(workers, len(items))):
            running.append(_Worker(preparation, events))  # one by one, so that `finally` knows those that have started
            running[-1].give(waiting.pop())
        left = len(items)
        while left:
            worker, message = events.get()
            if message is None:
                raise DataError(worker.why_it_ended())
            if "error" in message:
                raise _as_exception(message)
            if "progress" in message:
                on_progress(*message["progress"])
                continue
            left -= 1
            worker.item = None
            if waiting:
                worker.give(waiting.pop())
    finally:
        for worker in running:
            worker.kill()


class _Worker:
    def __init__(self, preparation: Preparation, events: queue.Queue[_Event]):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *module_path()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, start_new_session=True, text=True, encoding="utf-8",
        )  # fmt: skip
        self.item: Optional[WorkItem] = None
        self._send(preparation.to_json())
        threading.Thread(target=self._forward, args=(events,), daemon=True).start()

    def give(self, item: WorkItem) -> None:
        """Start on an item."""
        self.item = item
        self._send(item.to_json())

    def why_it_ended(self) -> str:
        """What happened to a worker that ended without a message."""
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = (
            " The system may have run out of memory: use fewer workers (--workers)." if code == -signal.SIGKILL else ""
        )
        name = self.item.parts[0].path if self.item else "nothing"
        return f"a worker process was {how} while it prepared {name}.{hint} Run the same command again to continue."

    def kill(self) -> None:
        """End the process now. What it was writing stays under a temporary name."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # unsent input of a process that has ended
                if stream is not None:
                    stream.close()

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the reading thread reports why
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _forward(self, events: queue.Queue[_Event]) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                events.put((self, json.loads(line)))
        except ValueError:
            pass  # closed by `kill`, or a line cut off by the worker's death
        events.put((self, None))


def _as_exception(message: dict[str, Any]) -> Exception:
    kind = getattr(errors, message["error"], None)
    if isinstance(kind, type) and issubclass(kind, SteepError):
        return kind(message["message"])
    return RuntimeError(f"a worker process failed:\n{message['message']}")
