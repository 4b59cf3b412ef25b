"""A flipped byte in the newest checkpoint: it is named, the one before is used, and the run ends bit for bit the same."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from processes import final_weights, same_records
from steep.config.load import load_run_config
from steep.core.errors import CheckpointError
from steep.training.loop import train
from support import run_mapping

GPT2 = {
    "_target_": "steep.models.gpt2.build_gpt2_model", "vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 1,
    "n_head": 4, "dropout": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def mapping(
    tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> dict[str, Any]:
    return run_mapping(
        tmp_path_factory.mktemp("runs"), corpus_directory, tiny_tokenizer_directory, model=GPT2, train={"steps": 6},
        checkpoint={"every_steps": 2, "keep_last": 3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(mapping: dict[str, Any]) -> Path:
    """The run that nothing happens to; its last checkpoint is of step 6, the ones before of 4 and 2."""
    return train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory


def copy_of_a_stopped_run(whole: Path, name: str) -> Path:
    """The run as it was when it had saved step 4 and was killed: later lines and checkpoint included."""
    run = whole.parent / name
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    return run


def resume(mapping: dict[str, Any], run: Path) -> str:
    stream = io.StringIO()
    changed = {**mapping, "run": {**mapping["run"], "name": run.name}}
    train(load_run_config(mapping=changed), stream=stream)
    return stream.getvalue()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.unlink()  # model.safetensors has two names; both are of this one file
    path.write_bytes(data)


def test_one_flipped_byte_in_any_file(whole: Path, mapping: dict[str, Any]) -> None:
    newest = whole / "checkpoints" / "epoch_0_step_6"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 10
    for number, file in enumerate(files):
        run = copy_of_a_stopped_run(whole, f"damaged{number}")
        flip(run / "checkpoints" / newest.name / file)
        printed = resume(mapping, run)
        assert f"{newest.name} cannot be used: " in printed, file
        assert file.name in printed.split("cannot be used: ")[1].split("\n")[0]
        assert "resuming from epoch_0_step_4" in printed
        assert same_records(run) == same_records(whole), file
        assert final_weights(run) == final_weights(whole), file
        shutil.rmtree(run)


@pytest.mark.parametrize("content", [None, b"", b"epoch_0_step_99\n", b"\xff\xfe../../etc"])
def test_a_damaged_latest(content: bytes | None, whole: Path, mapping: dict[str, Any]) -> None:
    """Of a run that was killed after step 4."""
    run = copy_of_a_stopped_run(whole, "damaged_latest")
    shutil.rmtree(run / "checkpoints" / "epoch_0_step_6")
    latest = run / "checkpoints" / "LATEST"
    latest.unlink() if content is None else latest.write_bytes(content)
    printed = resume(mapping, run)
    assert "LATEST" in printed
    assert "resuming from epoch_0_step_4" in printed
    assert same_records(run) == same_records(whole)
    assert final_weights(run) == final_weights(whole)
    shutil.rmtree(run)


def test_every_checkpoint_damaged(whole: Path, mapping: dict[str, Any]) -> None:
    """Nothing to resume from: refused, every file at fault named, and nothing is written over."""
    run = copy_of_a_stopped_run(whole, "damaged_all")
    for checkpoint in (run / "checkpoints").glob("epoch_*"):
        flip(checkpoint / "train_state.json")
    before = sorted(
        (path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file() and path.name != "run.lock"
    )
    with pytest.raises(CheckpointError, match=r"(?s)step_6.*train_state.json.*step_4.*step_2"):
        resume(mapping, run)
    after = sorted(
        (path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file() and path.name != "run.lock"
    )
    assert after == before
    shutil.rmtree(run)
