"""Ranks: the world of one, and the rules for errors and turns with two ranks that meet at real barriers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steep.core.errors import CheckpointError, ConfigError
from steep.core.lock import RunLock
from steep.runtime.ranks import Ranks, join_ranks
from steep.runtime.run_directory import RunDirectory


class Meeting:
    """Two threads of one process as ranks: they meet at a barrier and leave values for each other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.values: dict[int, Any] = {}

    def exchange(self, rank: int, value: Any) -> dict[int, Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = dict(self.values)
        self.barrier.wait()
        return found


def ranks_of(meeting: Meeting, number: int) -> Ranks:
    class Thread(Ranks):
        def broadcast(self, value: Any) -> Any:
            return meeting.exchange(self.rank, value)[0]

        def barrier(self) -> None:
            meeting.exchange(self.rank, None)

    return Thread(rank=number, local_rank=number, world=2)


def on_both(work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returned or raised on each of two ranks that run at the same time."""
    meeting, outcomes = Meeting(), [None, None]

    def run(number: int) -> None:
        try:
            outcomes[number] = work(ranks_of(meeting, number))
        except Exception as error:  # noqa: BLE001 - the test compares it
            outcomes[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return outcomes


def test_the_world_of_one_gives_back_what_it_is_given() -> None:
    ranks = join_ranks({})
    assert (ranks.rank, ranks.local_rank, ranks.world, ranks.is_first) == (0, 0, 1, True)
    assert ranks.agree(True, False) == (True, False)
    assert ranks.total([1.5, 2.0]) == [1.5, 2.0]
    assert (ranks.gather("a"), ranks.broadcast("a"), ranks.from_first(lambda: "a")) == (["a"], "a", "a")
    ranks.barrier()
    with ranks.phase("a test"), ranks.first_before_others():
        pass


@pytest.mark.parametrize("world", ["2", "8"])
def test_more_than_one_process_is_refused(world: str) -> None:
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is {world}: steep runs in one process"):
        join_ranks({"WORLD_SIZE": world})
    assert join_ranks({"WORLD_SIZE": "1"}).world == 1


def test_what_the_first_rank_makes_reaches_every_rank() -> None:
    made: list[int] = []

    def work(ranks: Ranks) -> str:
        return ranks.from_first(lambda: made.append(ranks.rank) or f"made by {ranks.rank}")

    assert on_both(work) == ["made by 0", "made by 0"]
    assert made == [0]


def test_an_error_of_the_first_rank_is_raised_on_every_rank() -> None:
    def fail() -> None:
        raise CheckpointError("in use")

    outcomes = on_both(lambda ranks: ranks.from_first(fail))
    assert [str(outcome) for outcome in outcomes] == ["in use", "in use"]


def test_a_lock_is_taken_by_the_first_rank_alone_and_its_refusal_reaches_all(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> str:
        with ranks.first_only(RunLock(tmp_path)):
            ranks.barrier()
            return "inside"

    assert on_both(work) == ["inside", "inside"]
    with RunLock(tmp_path):
        refused = on_both(work)
    assert all(isinstance(outcome, CheckpointError) and "is in use by process" in str(outcome) for outcome in refused)


def test_the_first_rank_goes_first_also_when_it_fails() -> None:
    order: list[int] = []

    def work(ranks: Ranks) -> None:
        with ranks.first_before_others():
            order.append(ranks.rank)
            if ranks.is_first:
                raise CheckpointError("the disk is full")

    first, second = on_both(work)
    assert order == [0, 1]
    assert isinstance(first, CheckpointError)
    assert second is None


def test_only_the_first_rank_writes_into_the_run_directory(tmp_path: Path) -> None:
    other = RunDirectory(tmp_path, Ranks(rank=1, local_rank=1, world=2))
    other.write("summary.json", {"status": "done"})
    other.write_sample(0, [("a", "b")])
    assert list(tmp_path.iterdir()) == []
    RunDirectory(tmp_path).write("summary.json", {"status": "done"})
    other.remove("summary.json")
    assert other.read("summary.json") == {"status": "done"}
