"""Files that fail under a run: a full disk, a folder that may not be written to or is gone, NaN. Then it goes on."""

from __future__ import annotations

import ctypes
import io
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import Steep, final_weights, same_records
from steep.config.load import load_run_config
from steep.core.errors import TrainingError
from steep.core.files import read_json
from steep.runtime.run_directory import RunDirectory
from steep.training.failure import explained_errors
from steep.training.loop import train
from support import run_mapping, steep, write_yaml

GPT2 = {
    "_target_": "steep.models.gpt2.build_gpt2_model", "vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 1,
    "n_head": 4, "dropout": 0.1,
}  # fmt: skip


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    return run_mapping(
        tmp_path,
        corpus_directory,
        tiny_tokenizer_directory,
        model=GPT2,
        train={"steps": 6},
        checkpoint={"every_steps": 2},
    )


def train_here(mapping: dict[str, Any], name: str, *overrides: str) -> Path:
    config = load_run_config(mapping={**mapping, "run": {**mapping["run"], "name": name}}, overrides=overrides)
    return train(config, stream=io.StringIO()).run_directory


def assert_ends_like_an_undisturbed_run(mapping: dict[str, Any], run: Path) -> None:
    assert train_here(mapping, "small") == run
    whole = train_here(mapping, "whole")
    assert same_records(run) == same_records(whole)
    assert final_weights(run) == final_weights(whole)
    assert not list(run.rglob(".partial-*"))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are set on Linux only")
@pytest.mark.parametrize("file", ["weights", "metrics"])
def test_a_disk_that_becomes_full(file: str, mapping: dict[str, Any], tmp_path: Path) -> None:
    """RLIMIT_FSIZE, lowered while the run trains, stands for the disk: no file can grow beyond it."""
    mapping["train"]["steps"] = 40
    run = tmp_path / "runs" / "small"
    with Steep("train", write_yaml(mapping, tmp_path / "run.yaml")) as process:
        assert process.wait_for("saved ")
        limit = 100_000 if file == "weights" else (run / "metrics.jsonl").stat().st_size
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert process.finish() == 1, process.output
    assert "Traceback" not in process.errors, process.errors
    assert "File too large" in process.errors
    assert str(run) in process.errors
    assert_ends_like_an_undisturbed_run(mapping, run)


def test_a_machine_without_enough_memory(tmp_path: Path) -> None:
    """On a CPU torch raises a plain RuntimeError where the system gives no memory: no machine has a pebibyte."""
    with (
        pytest.raises(TrainingError, match=r"(?s)not enough memory: .*What helps: a smaller train.micro_batch_size"),
        explained_errors(RunDirectory(tmp_path)),
    ):
        torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must match the size"), explained_errors(RunDirectory(tmp_path)):
        torch.ones(2) + torch.ones(3)


def start_two_steps(mapping: dict[str, Any]) -> Path:
    """The run, stopped after its second step by its time limit."""
    train_here(mapping, "small", "--train.max_seconds", "0.000001")
    return train_here(mapping, "small", "--train.max_seconds", "0.000001")


def obey_permissions() -> None:
    """Let even root be refused by file permissions after the next exec: drop CAP_DAC_OVERRIDE (Linux)."""
    if os.getuid() == 0:
        drop_from_bounding_set, override = 24, 1
        assert ctypes.CDLL(None).prctl(drop_from_bounding_set, override, 0, 0, 0) == 0


@pytest.mark.parametrize("folder", [".", pytest.param("runs/small", marks=pytest.mark.slow), "runs/small/checkpoints"])
def test_a_folder_that_may_not_be_written_to(folder: str, mapping: dict[str, Any], tmp_path: Path) -> None:
    run = start_two_steps(mapping) if folder != "." else None
    mapping["data"]["cache_directory"] = str(tmp_path / "cache")
    config = write_yaml(mapping, tmp_path / "run.yaml")
    (tmp_path / folder).chmod(0o555)
    try:
        with Steep("train", config, prepare_child=obey_permissions) as process:
            assert process.finish() == 1, process.output
    finally:
        (tmp_path / folder).chmod(0o755)
    assert "Permission denied" in process.errors
    assert "Traceback" not in process.errors, process.errors
    if run is not None:
        assert_ends_like_an_undisturbed_run(mapping, run)


@pytest.mark.slow
def test_a_run_directory_that_is_removed(mapping: dict[str, Any], tmp_path: Path) -> None:
    mapping["train"]["steps"] = 100_000
    with Steep("train", write_yaml(mapping, tmp_path / "run.yaml")) as process:
        assert process.wait_for("saved ")
        shutil.move(tmp_path / "runs" / "small", tmp_path / "taken_away")
        assert process.finish() == 1, process.output
    assert "Traceback" not in process.errors, process.errors
    assert f"the run directory {tmp_path / 'runs' / 'small'} was removed or renamed" in process.errors
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    shutil.move(tmp_path / "taken_away", tmp_path / "runs" / "small")
    mapping["train"]["max_seconds"] = 1e-6
    result = steep("train", str(write_yaml(mapping, tmp_path / "run.yaml")))
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout


MODEL = '''
import os
import torch
from steep.models.gpt2 import build_gpt2_model

def build(**sizes):
    """A GPT-2 whose hidden states are NaN from forward pass number NAN_AT on, like one on broken hardware."""
    model, calls = build_gpt2_model(**sizes), []
    def spoil(module, arguments, output):
        if module.training:
            calls.append(1)
        return output * float("nan") if len(calls) >= int(os.environ.get("NAN_AT", "1000000")) else output
    model.transformer.ln_f.register_forward_hook(spoil)
    return model
'''


def test_nan_stops_the_run_and_a_later_start_goes_on(mapping: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    mapping["model"] = {**GPT2, "_target_": f"{tmp_path / 'model.py'}:build"}
    config, run = write_yaml(mapping, tmp_path / "run.yaml"), tmp_path / "runs" / "small"
    failed = steep("train", str(config), NAN_AT="4")
    assert failed.returncode == 1, failed.stdout
    assert "step 3: the loss is nan" in failed.stderr
    assert "sequences 12 to 15 of the sample order" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert read_json(run / "summary.json")["status"] == "failed"
    assert "step 3: the loss is nan" in read_json(run / "summary.json")["error"]
    assert (run / "checkpoints" / "LATEST").read_text() == "epoch_0_step_2\n"
    assert_ends_like_an_undisturbed_run(mapping, run)
    assert read_json(run / "summary.json")["status"] == "done"


def test_leftovers_of_a_killed_process_are_collected(mapping: dict[str, Any]) -> None:
    run = start_two_steps(mapping)
    for name in (
        ".partial-123-metrics.jsonl",
        "samples/.partial-123-step_0.md",
        "checkpoints/.partial-123-epoch_0_step_4",
    ):
        (run / name).write_text("half")
    assert_ends_like_an_undisturbed_run(mapping, run)


@pytest.mark.slow
def test_a_refused_start_leaves_the_lines_of_the_run(
    mapping: dict[str, Any], tmp_path: Path, documents: list[str]
) -> None:
    """Lines after the newest checkpoint go when the run goes on, not when it is refused."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(documents[:20]):
        (corpus / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    mapping["data"]["train"] = [{"path": str(corpus)}]
    mapping["train"]["steps"], mapping["checkpoint"]["every_steps"] = 12, 4
    with Steep("train", write_yaml(mapping, tmp_path / "run.yaml")) as process:
        assert process.wait_for("saved ")
        assert process.wait_for("step ")
        process.process.kill()
        process.finish()
    run = tmp_path / "runs" / "small"
    lines = (run / "metrics.jsonl").read_text()
    text = (corpus / "000.txt").read_text()
    (corpus / "000.txt").write_text("other text")
    refused = steep("train", str(tmp_path / "run.yaml"))
    assert refused.returncode == 1
    assert "the data has changed" in refused.stderr
    assert (run / "metrics.jsonl").read_text() == lines
    (corpus / "000.txt").write_text(text)
    assert_ends_like_an_undisturbed_run(mapping, run)
