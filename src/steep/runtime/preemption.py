"""SIGTERM and SIGINT as a wish that the loop grants between steps: save, then leave."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class StopSignals:
    """While open, SIGTERM and SIGINT are noted in `received` instead of raised; a second SIGINT leaves at once.

    on_first: called in the handler with a line for the terminal. Outside the main thread nothing is installed, since only the
    main thread can handle signals (a notebook's background thread, say).
    """

    def __init__(self, on_first: Callable[[str], None]):
        self.received: signal.Signals | None = None
        self._on_first = on_first
        self._previous: dict[signal.Signals, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(130)  # at once: the newest complete checkpoint on disk stands
        if self.received is None:
            self.received = signal.Signals(number)
            self._on_first(
                f"{self.received.name} received: saving after this step, then leaving (Ctrl-C again leaves at once)"
            )

    @property
    def exit_code(self) -> int:
        """0 without a signal, 130 after SIGINT, 143 after SIGTERM."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
