"""Who this process is among those that train together, and how they agree.

A `Ranks` value is passed down to whatever differs by rank; nothing else asks for a rank. For now there is the world of one, which
needs no torch.distributed and costs nothing. A later world overrides the methods; their meaning is fixed here: every rank calls
them in the same order, and every rank gets the same answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from steep.core.errors import ConfigError, SteepError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees them."""

    rank: int = 0
    """Number of this process, from 0."""
    local_rank: int = 0
    """Its number on this machine."""
    world: int = 1
    """Number of processes."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes to the console, the trackers and the files that all ranks share."""
        return self.rank == 0

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, True everywhere if it is True on any rank. For clocks and signals, which differ by rank."""
        return flags

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum over all ranks of each value, in fp64."""
        return list(values)

    def gather(self, value: Value) -> list[Value]:
        """The value of every rank, in the order of ranks, on every rank."""
        return [value]

    def broadcast(self, value: Value) -> Value:
        """The first rank's value, on every rank."""
        return value

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` gives on the first rank, on every rank; an error that it raises there is raised everywhere."""
        made: Value | SteepError | OSError | None = None
        if self.is_first:
            try:
                made = make()
            except (SteepError, OSError) as error:
                made = error
        made = self.broadcast(made)
        if isinstance(made, (SteepError, OSError)):
            raise made
        return made  # type: ignore[return-value]  # None on another rank is replaced by what the first one sends

    @contextmanager
    def first_only(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Hold a context on the first rank alone, such as a lock; a SteepError in entering it is raised on every rank."""
        with ExitStack() as stack:

            def enter() -> None:  # what entering gives stays on the first rank
                stack.enter_context(context)

            self.from_first(enter)
            yield

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first rank runs the block and the others after it, when they find on disk what it has written."""
        if not self.is_first:
            self.barrier()
        try:
            yield
        finally:
            if self.is_first:
                self.barrier()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what this rank is doing, so that a rank that waits for it in vain can say so."""
        yield


def join_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The world that this process was started in. Raises ConfigError for more than one process: not supported yet.

    environment: WORLD_SIZE as torchrun and other launchers set it.
    """
    world = environment.get("WORLD_SIZE", "1")
    if world not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE is {world}: steep runs in one process for now, and each of these would do all of the work. "
            "Start it once, without torchrun."
        )
    return Ranks()
