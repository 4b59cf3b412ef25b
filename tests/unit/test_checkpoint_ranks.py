"""Checkpoints of several ranks: threads save together, each with its own pieces; one that fails fails them all."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import find_checkpoint, open_checkpoint
from steep.checkpoint.manifest import read_manifest
from steep.checkpoint.pieces import Piece, whole_pieces
from steep.checkpoint.safetensors_writer import write_safetensors
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError
from steep.runtime.ranks import Ranks

NAME = "epoch_0_step_4"
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """One of several threads. Values are pickled, as they would be between processes."""

    barrier_of_all: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    values: list[bytes] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = pickle.dumps(value)
        self.barrier_of_all.wait(timeout=60)
        gathered = [pickle.loads(data) for data in self.values]
        self.barrier_of_all.wait(timeout=60)
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def together(world: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What each rank returns or raises."""

    def attempt(ranks: ThreadRanks) -> Any:
        try:
            return work(ranks)
        except Exception as error:  # noqa: BLE001
            return error

    barrier, values = threading.Barrier(world), [b""] * world
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(attempt, [ThreadRanks(n, n, world, barrier, values) for n in range(world)]))


def whole_model() -> dict[str, Tensor]:
    own = torch.Generator().manual_seed(0)  # the threads of a test would share torch's
    return {
        "rows": torch.randn(7, 4, generator=own),
        "few_rows": torch.randn(2, 3, generator=own).bfloat16(),
        "columns": torch.arange(40).reshape(4, 10),
        "norm": torch.randn(5, generator=own),
        "scalar": torch.tensor(3.0),
    }


CUT = {"rows": ROWS, "few_rows": ROWS, "columns": COLUMNS, "rows.exp_avg": ROWS}


def cut(tensors: dict[str, Tensor], rank: int, world: int) -> list[Piece]:
    """A rank's pieces, cut as torch.chunk does: the last are smaller or empty. What is not cut is the first rank's."""
    pieces = []
    for name, tensor in tensors.items():
        if name in CUT:
            dim = CUT[name]
            size = -(-tensor.shape[dim] // world)
            start = min(rank * size, tensor.shape[dim])
            offset = tuple(start if d == dim else 0 for d in range(tensor.dim()))
            part = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
            pieces.append(Piece(name, tuple(tensor.shape), offset, part))
        elif rank == 0:
            pieces += whole_pieces({name: tensor})
    return pieces


def state(rank: int, world: int) -> CheckpointState:
    model = whole_model()
    moments = {"rows.exp_avg": model["rows"] * 2, "rows.step": torch.tensor(4.0)}
    return CheckpointState(
        model=cut(model, rank, world),
        optimizer=cut(moments, rank, world),
        optimizer_state={"class": "AdamW", "param_groups": [], "state": {}},
        rng={"torch": f"{rank:02d}"},
        config_yaml="run: {}\n", step=4, tokens=400, sequences_seen=32, plan_fingerprint="f00",
        train_state={"step": 4}, hf_files={"config.json": b"{}"},
    )  # fmt: skip


def save(directory: Path, world: int, change: Callable[[int, CheckpointState], CheckpointState] | None = None,
         asynchronous: bool = True) -> tuple[list[Any], list[list[str]]]:  # fmt: skip
    """Save on every rank; what each raised, and the lines of each rank's console."""
    lines: list[list[str]] = [[] for _ in range(world)]

    def work(ranks: ThreadRanks) -> None:
        mine = state(ranks.rank, world)
        mine = change(ranks.rank, mine) if change else mine
        with CheckpointWriter(directory, asynchronous, ranks=ranks, on_event=lines[ranks.rank].append) as writer:
            writer.reserve(mine)
            writer.save(NAME, mine)

    return together(world, work), lines


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_save_one_checkpoint(tmp_path, world, asynchronous):
    errors, lines = save(tmp_path, world, asynchronous=asynchronous)
    assert errors == [None] * world
    assert [line.split()[0] for line in lines[0]] == ["saving", "saved"]
    assert not any(lines[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", NAME]

    path = find_checkpoint(tmp_path)  # every file verified
    checkpoint = open_checkpoint(path)
    assert checkpoint.manifest.world_size == world
    assert [checkpoint.rng(rank) for rank in range(world)] == [{"torch": f"{rank:02d}"} for rank in range(world)]
    expected = whole_model()
    loaded, consolidated = checkpoint.model_tensors(), load_file(path / "model" / "consolidated" / "model.safetensors")
    assert loaded.keys() == consolidated.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(consolidated[name], tensor), name
        assert loaded[name].dtype == consolidated[name].dtype == tensor.dtype
    assert torch.equal(checkpoint.optimizer_tensors()["rows.exp_avg"], expected["rows"] * 2)


@pytest.mark.parametrize("world", [2, 3])
def test_consolidated_weights_are_the_bytes_that_one_process_writes(tmp_path, world):
    save(tmp_path, world)
    entry = write_safetensors(tmp_path / "whole", whole_model(), {"format": "pt"})
    assert read_manifest(tmp_path / NAME).files["model/consolidated/model.safetensors"] == entry
    assert (tmp_path / NAME / "model/consolidated/model.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_consolidated_weights_are_put_together_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Of what is read for them nothing is kept."""
    import weakref

    from steep.checkpoint import consolidate

    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def read(*arguments: Any) -> Tensor:
        alive.append(sum(reference() is not None for reference in kept))
        tensor = read_tensor(*arguments)
        kept.append(weakref.ref(tensor))
        return tensor

    read_tensor = consolidate.read_tensor
    monkeypatch.setattr(consolidate, "read_tensor", read)
    assert save(tmp_path, 3)[0] == [None] * 3
    assert len(alive) == len(whole_model())
    assert max(alive) == 0


def test_one_rank_that_holds_the_whole_model_is_linked(tmp_path):
    def change(rank: int, mine: CheckpointState) -> CheckpointState:
        return replace(mine, model=whole_pieces(whole_model()) if rank == 1 else ())

    assert save(tmp_path, 2, change)[0] == [None, None]
    folder = tmp_path / NAME / "model"
    assert os.path.samefile(folder / "rank_00001.safetensors", folder / "consolidated" / "model.safetensors")


def assert_nothing_was_published(directory: Path) -> None:
    assert list(directory.iterdir()) == []


def test_an_error_of_one_rank_is_raised_by_all(tmp_path, monkeypatch):
    from steep.checkpoint import folder

    def failing(path: Path, *arguments: Any) -> Any:
        if path.name == "rank_00001.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return write_safetensors(path, *arguments)

    monkeypatch.setattr(folder, "write_safetensors", failing)
    errors, lines = save(tmp_path, 3)
    assert [type(error) for error in errors] == [CheckpointError] * 3
    assert {str(error) for error in errors} == {
        f"rank 1: saving {NAME} failed: [Errno 5] Input/output error. Earlier checkpoints are untouched."
    }
    assert lines[0] == [f"saving {NAME}"]
    assert_nothing_was_published(tmp_path)


def test_an_error_of_the_first_rank_is_raised_by_all(tmp_path):
    def change(rank: int, mine: CheckpointState) -> CheckpointState:
        return replace(mine, hf_files={"../outside": b""})

    errors, _ = save(tmp_path, 2, change)
    assert {(type(error), str(error)) for error in errors} == {
        (CheckpointError, "'../outside' is not the name of a file inside the checkpoint")
    }
    assert_nothing_was_published(tmp_path)


def test_a_program_error_is_raised_as_it_is_where_it_happened(tmp_path):
    def change(rank: int, mine: CheckpointState) -> CheckpointState:
        return replace(mine, rng={"torch": float("nan")}) if rank == 1 else mine

    errors, _ = save(tmp_path, 2, change)
    assert [type(error) for error in errors] == [CheckpointError, ValueError]
    assert "rank 1: saving" in str(errors[0])
    assert_nothing_was_published(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda piece: replace(piece, offset=(3, 0)), "rows: its shards do not cover"),
        (lambda piece: replace(piece, offset=(5, 0)), "rows: a shard in rank_00001.safetensors lies outside"),
        (lambda piece: replace(piece, tensor=piece.tensor.double()), "the ranks disagree about rows"),
        (lambda piece: replace(piece, name="other"), "rows: its shards do not cover"),
    ],
)
def test_pieces_that_are_not_one_tensor_are_refused(tmp_path, change, message):
    def changed(rank: int, mine: CheckpointState) -> CheckpointState:
        return replace(mine, model=[change(mine.model[0]), *mine.model[1:]]) if rank == 1 else mine

    errors, _ = save(tmp_path, 2, changed)
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(CheckpointError, match=message):
        raise errors[1]
    assert_nothing_was_published(tmp_path)


def test_two_pieces_of_one_name_on_a_rank_are_refused(tmp_path):
    def change(rank: int, mine: CheckpointState) -> CheckpointState:
        return replace(mine, model=[*mine.model, mine.model[0]])

    errors, _ = save(tmp_path, 2, change)
    assert all("rank 0: model/rank_00000.safetensors: two pieces have the same name" in str(error) for error in errors)


def test_the_ranks_refuse_a_full_disk_together(tmp_path, monkeypatch):
    """As in the faults: the test cannot fill the disk of the machine it runs on."""
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1 << 20))
    errors, _ = save(tmp_path, 2)
    assert len({str(error) for error in errors}) == 1
    assert "disk full: needed 64.0 MiB, had 1.0 MiB" in str(errors[1])


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    errors, _ = save(tmp_path / "checkpoints", 2)
    assert len({str(error) for error in errors}) == 1
    assert "checkpoints cannot be written to" in str(errors[1])


def test_a_failed_save_is_raised_by_the_next_one_and_not_in_between(tmp_path, monkeypatch):
    """Ranks notice at different moments that a save has failed; they may only leave the loop together."""
    from steep.checkpoint import folder

    real = folder.write_safetensors
    failing = threading.Event()
    failing.set()

    def write(*arguments: Any) -> Any:
        if failing.is_set():
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(folder, "write_safetensors", write)

    def work(ranks: ThreadRanks) -> None:
        with CheckpointWriter(tmp_path, ranks=ranks) as writer:
            writer.save(NAME, state(ranks.rank, 2))
            writer._in_flight.exception()  # it has failed
            writer.raise_failure()
            with pytest.raises(CheckpointError, match=f"saving {NAME} failed"):
                writer.save(NAME, state(ranks.rank, 2))
            ranks.gather(None)
            failing.clear()
            writer.save(NAME, state(ranks.rank, 2))

    assert together(2, work) == [None, None]
    assert find_checkpoint(tmp_path).name == NAME
