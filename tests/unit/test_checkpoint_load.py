"""Finding and reading checkpoints: order, several ranks, retention; comparison of settings."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from steep.checkpoint.compare import differences, warnings
from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import find_checkpoint, load_tensors, open_checkpoint, verify
from steep.checkpoint.manifest import MANIFEST_NAME, canonical_text, checkpoint_name, read_manifest, write_file
from steep.checkpoint.pieces import whole_pieces
from steep.checkpoint.retention import LATEST, apply_retention, checkpoint_folders, collect_leftovers, write_latest
from steep.checkpoint.safetensors_writer import write_safetensors
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError


def state(step: int, **changes) -> CheckpointState:
    values = {
        "model": whole_pieces({"w": torch.full((4, 6), float(step)), "b": torch.full((3,), float(step))}),
        "optimizer": whole_pieces({"w.exp_avg": torch.full((4, 6), float(step)), "w.step": torch.tensor(float(step))}),
        "optimizer_state": {"class": "AdamW", "param_groups": [], "state": {}},
        "rng": {"torch": "00"}, "config_yaml": "run: {}\n", "step": step, "tokens": step * 100,
        "sequences_seen": step * 8, "plan_fingerprint": "f00", "hf_files": {"config.json": b"{}"},
    }  # fmt: skip
    return CheckpointState(**{**values, **changes})


def find(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint that is found, and what was said."""
    said: list[str] = []
    return find_checkpoint(path, said.append), said


def save_steps(directory: Path, *steps: int, **arguments) -> None:
    with CheckpointWriter(directory, **arguments) as writer:
        for step in steps:
            writer.save(checkpoint_name(0, step), state(step))


def names(directory: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(directory)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_folder_its_checkpoints_and_a_checkpoint_are_found(tmp_path, asynchronous):
    save_steps(tmp_path / "checkpoints", 5, 10, asynchronous=asynchronous)
    newest = tmp_path / "checkpoints" / "epoch_0_step_10"
    for path in (tmp_path, tmp_path / "checkpoints", newest):
        assert find(path) == (newest, [])
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "epoch_0_step_10\n"
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))
    checkpoint = open_checkpoint(newest)
    assert checkpoint.manifest.tokens == 1000
    assert torch.equal(checkpoint.model_tensors()["w"], torch.full((4, 6), 10.0))
    assert checkpoint.optimizer_tensors()["w.step"] == 10.0
    assert checkpoint.rng() == {"torch": "00"}


def test_saving_copies_before_it_returns(tmp_path):
    weights = torch.zeros(1_000_000)
    with CheckpointWriter(tmp_path) as writer:
        for step in range(1, 6):
            weights.fill_(step)
            writer.save(checkpoint_name(0, step), state(step, model=whole_pieces({"w": weights})))
            weights.fill_(-1)  # training goes on while the thread writes
    for step in range(1, 6):
        saved = load_tensors(tmp_path / checkpoint_name(0, step), "model")["w"]
        assert torch.equal(saved, torch.full_like(saved, step))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_memory_may_be_reserved_before_the_first_save(tmp_path, asynchronous):
    with CheckpointWriter(tmp_path, asynchronous) as writer:
        writer.reserve(state(1))
        writer.save("epoch_0_step_2", state(2))
    assert torch.equal(load_tensors(find_checkpoint(tmp_path), "model")["w"], torch.full((4, 6), 2.0))


def test_consolidated_weights_are_the_same_bytes_on_disk(tmp_path):
    save_steps(tmp_path, 1)
    folder = tmp_path / "epoch_0_step_1" / "model"
    assert os.path.samefile(folder / "rank_00000.safetensors", folder / "consolidated" / "model.safetensors")
    assert (folder / "consolidated" / "config.json").read_bytes() == b"{}"


def test_order_is_by_step_and_not_by_file_time(tmp_path):
    save_steps(tmp_path, 9, 100, 20)
    (tmp_path / LATEST).unlink()
    os.utime(tmp_path / "epoch_0_step_9")
    path, messages = find(tmp_path)
    assert path.name == "epoch_0_step_100"
    assert messages == ["LATEST is missing or unreadable", "using epoch_0_step_100"]
    assert names(tmp_path) == ["epoch_0_step_100", "epoch_0_step_20", "epoch_0_step_9"]


def test_latest_names_the_one_to_use(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    write_latest(tmp_path, "epoch_0_step_2")
    assert find_checkpoint(tmp_path).name == "epoch_0_step_2"


@pytest.mark.parametrize("text", [b"epoch_0_step_77\n", b"../elsewhere\n", b"/etc\n", b"\xff\xfe", b"", b"\0" * 500])
def test_latest_pointing_nowhere_is_said_and_passed_over(tmp_path, text):
    save_steps(tmp_path, 1, 2)
    (tmp_path / LATEST).write_bytes(text)
    path, messages = find(tmp_path)
    assert path.name == "epoch_0_step_2"
    assert messages[0].startswith("LATEST ")


def test_nothing_to_find_is_an_error_that_says_where(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint in .*\n  there is none"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_checkpoint(tmp_path / "absent")


def test_a_bad_name_is_refused_before_anything_is_written(tmp_path):
    with CheckpointWriter(tmp_path) as writer, pytest.raises(CheckpointError, match="not a checkpoint's name"):
        writer.save("../outside", state(1))
    assert list(tmp_path.iterdir()) == []


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    scores = {1: 3.0, 2: 2.0, 3: 2.5, 4: None, 5: float("nan"), 6: 2.7}
    with CheckpointWriter(tmp_path, keep_last=2) as writer:
        for step, score in scores.items():
            writer.save(checkpoint_name(0, step), state(step, score=score))
    assert names(tmp_path) == ["epoch_0_step_6", "epoch_0_step_5", "epoch_0_step_2"]
    assert [path.name for path in apply_retention(tmp_path, 1, keep_best=False)] == ["epoch_0_step_5", "epoch_0_step_2"]


def test_retention_never_takes_the_one_latest_names_nor_what_is_ahead_of_it(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    write_latest(tmp_path, "epoch_0_step_2")
    assert [path.name for path in apply_retention(tmp_path, 1)] == ["epoch_0_step_1"]
    assert names(tmp_path) == ["epoch_0_step_4", "epoch_0_step_3", "epoch_0_step_2"]


def test_retention_neither_counts_nor_deletes_what_is_not_whole(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / "epoch_0_step_2" / "config.yaml").unlink()
    (tmp_path / "epoch_0_step_9").mkdir()
    assert apply_retention(tmp_path, 2) == []
    assert names(tmp_path) == ["epoch_0_step_9", "epoch_0_step_3", "epoch_0_step_2", "epoch_0_step_1"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    with CheckpointWriter(tmp_path, keep_last=2) as writer:
        writer.save("epoch_0_step_1", state(1))
        writer.save("epoch_0_step_1", state(1, tokens=7))
    assert verify(tmp_path / "epoch_0_step_1").tokens == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "epoch_0_step_1"]


def test_leftovers_are_collected_and_a_replaced_checkpoint_is_put_back(tmp_path):
    save_steps(tmp_path, 1, 2)
    os.rename(tmp_path / "epoch_0_step_2", tmp_path / ".partial-12-replaced-epoch_0_step_2")
    (tmp_path / ".partial-12-epoch_0_step_3" / "model").mkdir(parents=True)
    (tmp_path / ".partial-12-LATEST").write_text("x")
    messages = []
    collect_leftovers(tmp_path, messages.append)
    assert len(messages) == 3
    assert find(tmp_path) == (tmp_path / "epoch_0_step_2", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "epoch_0_step_1", "epoch_0_step_2"]


def write_two_ranks(directory: Path) -> Path:
    """A checkpoint as two ranks would write it: `w` cut by rows, `grid` by columns unevenly, `b` and `s` whole."""
    save_steps(directory, 4)
    path = directory / "epoch_0_step_4"
    w, grid = torch.arange(24.0).reshape(4, 6), torch.arange(10).reshape(2, 5)
    ranks = [{"w": w[:3], "grid": grid[:, :2], "s": torch.tensor(5.0)}, {"w": w[3:], "grid": grid[:, 2:]}]
    first, second = "rank_00000.safetensors", "rank_00001.safetensors"
    index = {
        "w": {"dtype": "F32", "shape": [4, 6], "shards": [
            {"file": first, "offset": [0, 0], "shape": [3, 6]}, {"file": second, "offset": [3, 0], "shape": [1, 6]}]},
        "grid": {"dtype": "I64", "shape": [2, 5], "shards": [
            {"file": first, "offset": [0, 0], "shape": [2, 2]}, {"file": second, "offset": [0, 2], "shape": [2, 3]}]},
        "s": {"dtype": "F32", "shape": [], "shards": [{"file": first, "offset": [], "shape": []}]},
    }  # fmt: skip
    (path / "model" / first).unlink()
    entries = {
        f"model/{n}": write_safetensors(path / "model" / n, t) for n, t in zip((first, second), ranks, strict=True)
    }
    entries["rng/rank_00001.json"] = write_file(path / "rng" / "rank_00001.json", b"{}\n")
    seal(path, {"tensors": index}, entries, world_size=2)
    return path


def seal(path: Path, index: dict, entries: dict, **changes) -> None:
    """Write a valid manifest over a changed index."""
    shards = write_file(path / "model" / "shards.json", canonical_text(index).encode())
    manifest = read_manifest(path)
    manifest = dataclasses.replace(manifest, files=manifest.files | entries | {"model/shards.json": shards}, **changes)
    (path / MANIFEST_NAME).write_text(manifest.to_text())


def test_shards_of_two_ranks_are_put_together(tmp_path):
    path = write_two_ranks(tmp_path)
    assert verify(path).world_size == 2
    tensors = load_tensors(path, "model")
    assert torch.equal(tensors["w"], torch.arange(24.0).reshape(4, 6))
    assert torch.equal(tensors["grid"], torch.arange(10).reshape(2, 5))
    assert tensors["s"] == 5.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["w"]["shards"].pop(), "do not cover"),
        (lambda index: index["w"]["shards"][1].update(offset=[2, 0]), "do not cover"),
        (lambda index: index["w"]["shards"][1].update(offset=[4, 0]), "lies outside"),
        (lambda index: index["w"]["shards"][1].update(offset=[-1, 0]), "not a list of sizes"),
        (lambda index: index["w"]["shards"][1].update(offset=[10**30, 0]), "not a list of sizes"),
        (lambda index: index["w"].update(dtype="F99"), "not an index of tensors"),
        (lambda index: index["w"].pop("shape"), "not an index of tensors"),
        (lambda index: index["w"]["shards"][1].update(file="../../../x.safetensors"), "which the manifest lacks"),
    ],
)
def test_an_index_that_cannot_be_is_named(tmp_path, change, message):
    path = write_two_ranks(tmp_path)
    index = json.loads((path / "model" / "shards.json").read_text())
    change(index["tensors"])
    seal(path, index, {})
    with pytest.raises(CheckpointError, match=f"model/shards.json.*{message}"):
        verify(path)


def test_an_index_that_contradicts_the_tensors_is_named(tmp_path):
    path = write_two_ranks(tmp_path)
    index = json.loads((path / "model" / "shards.json").read_text())
    index["tensors"]["s"]["dtype"] = "F64"
    index["tensors"]["other"] = index["tensors"]["w"]
    seal(path, index, {})
    with pytest.raises(
        CheckpointError, match=r"model/rank_00000.safetensors: (s is torch.float32|other cannot be read)"
    ):
        load_tensors(path, "model")


SAVED = {
    "run": {"name": "a", "seed": 1},
    "model": {"pretrained": "hub/model"},
    "data": {"sequence_length": 128, "train": [{"path": "a.txt"}]},
    "train": {"steps": 10, "threads": 2, "global_batch_size": 8},
    "optimizer": {"betas": (0.9, 0.95)},
    "trackers": [],
}


def changed(section: str, **values) -> dict:
    return {**SAVED, section: {**SAVED[section], **values}}


def test_equal_settings_have_no_differences():
    current = json.loads(json.dumps({**SAVED, "report": None}))
    assert differences(SAVED, current, "p", "p") == []
    assert warnings(SAVED, current) == []


@pytest.mark.parametrize(
    ("current", "line"),
    [
        (changed("run", seed=2), "run.seed: saved 1, now 2"),
        (changed("model", pretrained="hub/other"), "model.pretrained: saved 'hub/model', now 'hub/other'"),
        (changed("train", global_batch_size=16), "train.global_batch_size: saved 8, now 16"),
        (changed("optimizer", betas=[0.9, 0.99]), "optimizer.betas[1]: saved 0.95, now 0.99"),
        (changed("model", config={"x": 1}), "model.config.x: saved absent, now 1"),
    ],
)
def test_another_run_is_refused_by_key_with_both_values(current, line):
    assert differences(SAVED, current, "p", "p") == [line]


def test_data_may_move_but_not_change():
    moved = changed("data", train=[{"path": "b.txt"}])
    assert differences(SAVED, moved, "p", "p") == []
    assert differences(SAVED, moved, "p", "q") == [
        "sample order: saved p, now q: other sequences",
        "data.train[0].path: saved 'a.txt', now 'b.txt'",
    ]
    assert differences(SAVED, moved) == ["data.train[0].path: saved 'a.txt', now 'b.txt'"]


def test_what_may_change_is_allowed_and_what_matters_is_said():
    current = {**changed("train", steps=20, threads=4, max_seconds=5), "trackers": [{"name": "x"}], "console": {"w": 1}}
    assert differences(SAVED, current, "p", "p") == []
    lines = warnings(SAVED, current)
    assert [line.partition(":")[0] for line in lines] == ["train.steps", "train.threads"]
    assert "threads: saved 2, now 4: sums are taken in another order" in lines[1]


def test_real_configurations_compare():
    from steep.config.run import RunConfig

    content = {"model": {"pretrained": "x"}, "data": {"train": [{"path": "a"}]}}
    saved = RunConfig.model_validate(content).to_mapping()
    other = RunConfig.model_validate({**content, "optimizer": {"learning_rate": 0.5}, "console": {"width": 90}})
    assert differences(saved, other.to_mapping(), "p", "p") == ["optimizer.learning_rate: saved 0.0003, now 0.5"]
