"""Signals as a wish that the loop grants between steps: save, then leave."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What a cluster, a person and a terminal that is closed send; what batch systems send before the time is over (Slurm's --signal,
SGE); what the kernel sends at the limit of CPU time."""


class Interrupted(KeyboardInterrupt):
    """A signal came while there was nothing to save. No Exception, so that nothing takes it for a mistake."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.exit_code = 128 + number


def tell_terminal(text: str) -> None:
    """Write a line to standard error from a signal handler, past Python's streams, which may be in the middle of a line.

    Does nothing where nobody reads it: the terminal that has just been closed gives an error.
    """
    start = "\r\n" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{start}{text}\n".encode())


class StopSignals:
    """While open, each of STOPS is noted in `received`; a SIGINT after another of them leaves at once.

    SIGHUP and the later ones stay ignored where they are ignored already: that is what `nohup` does.

    Until `may_save` is called there is nothing to save, and a signal raises Interrupted; so it does inside `prompt`.
    tell: called in the handler with a line for the terminal. Outside the main thread nothing is installed, since only the
    main thread can handle signals (a notebook's background thread, say).
    """

    def __init__(self, tell: Callable[[str], None] = tell_terminal):
        self.received: signal.Signals | None = None
        self._tell = tell
        self._raises = True
        self._previous: dict[signal.Signals, object] = {}

    def may_save(self) -> None:
        """From now on a signal waits for the end of the step. Raises Interrupted if one has come already."""
        self._check()
        self._raises = False

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """A block that can be done again and so need not be waited for: a signal in it, or before it, raises Interrupted."""
        self._raises = True
        try:
            self._check()
            yield
        finally:
            self._raises = False

    def _check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                leave_at_once()
            return
        self.received = signal.Signals(number)
        if number == signal.SIGHUP:
            discard_closed_terminal()
        if self._raises:
            raise Interrupted(self.received)
        self._tell(
            f"{self.received.name} received: leaving as soon as everything is saved (Ctrl-C again leaves at once)"
        )

    @property
    def exit_code(self) -> int:
        """0 without a signal, else 128 and its number: 129 after SIGHUP, 130 after SIGINT, 143 after SIGTERM."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if number in STOPS[:2] or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def leave_at_once() -> None:
    """End the process now, with 130 and a line: the newest complete checkpoint on disk stands. A bar has hidden the cursor."""
    if sys.__stdout__ is not None and os.isatty(1):
        os.write(1, b"\x1b[?25h\n")
    tell_terminal("left at once, without saving; the same command continues from the newest complete checkpoint")
    os._exit(130)


def discard_closed_terminal() -> None:
    """Discard from now on what is written to a terminal that was closed, where each write is an error; files stay as they are."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            discard(descriptor)


def discard(descriptor: int) -> None:
    """Discard everything that is written to `descriptor`, a file or pipe, from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
