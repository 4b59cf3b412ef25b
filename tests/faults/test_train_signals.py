"""Signals and time limits: the run saves, leaves with the right exit code, and goes on as if nothing had been."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from processes import Steep, final_weights, same_records
from steep.config.load import load_run_config
from steep.core.files import read_json
from steep.training.engine import TorchEngine
from steep.training.loop import train
from support import run_mapping, steep, write_yaml

GPT2 = {
    "_target_": "steep.models.gpt2.build_gpt2_model", "vocab_size": 512, "n_positions": 64, "n_embd": 64, "n_layer": 2,
    "n_head": 4, "dropout": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path) -> Path:
    """The run directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    mapping = small_run(directory, corpus_directory, tiny_tokenizer_directory)
    return train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory


def small_run(directory: Path, corpus: Path, tokenizer: Path, **changes: Any) -> dict[str, Any]:
    """Nine steps with dropout, scored after every second one."""
    merged: dict[str, Any] = {
        "model": GPT2, "train": {"steps": 9}, "evaluate": {"every_steps": 3, "prompts": ["The"], "sample_tokens": 4},
        "checkpoint": {"every_steps": 4}, **changes,
    }  # fmt: skip
    merged["train"] = {"steps": 9, **merged["train"]}
    return run_mapping(directory, corpus, tokenizer, **merged)


@pytest.fixture
def config(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> Path:
    """The same run as `whole`, not yet started."""
    return write_yaml(small_run(tmp_path, corpus_directory, tiny_tokenizer_directory), tmp_path / "run.yaml")


def assert_ends_like(whole: Path, config: Path) -> None:
    """Start the command again, to the end; everything equals the uninterrupted run."""
    result = steep("train", str(config))
    assert result.returncode == 0, result.stderr
    run = config.parent / "runs" / "small"
    assert same_records(run) == same_records(whole)
    assert final_weights(run) == final_weights(whole)


def latest_step(run: Path) -> int:
    return int((run / "checkpoints" / "LATEST").read_text().rpartition("_")[2])


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 138),
        (signal.SIGUSR2, 140),
        (signal.SIGXCPU, 152),
    ],
)
def test_a_signal_saves_and_leaves(number: signal.Signals, code: int, config: Path, whole: Path) -> None:
    with Steep("train", config) as process:
        assert process.wait_for("step ", 2)
        process.send(number)
        assert process.finish() == code, process.errors
    run = config.parent / "runs" / "small"
    steps = [record["step"] for record in same_records(run) if record["kind"] == "train"]
    assert latest_step(run) == steps[-1] + 1 < 9
    assert read_json(run / "summary.json")["status"] == "interrupted"
    assert f"{number.name} received" in process.errors
    assert f"{number.name} received" in (run / "console.log").read_text()
    assert "Traceback" not in process.errors
    assert_ends_like(whole, config)


@pytest.mark.parametrize("progress", ["bar", "plain"])
def test_a_closed_terminal_saves_and_leaves(progress: str, config: Path, whole: Path) -> None:
    """Whatever is written to a terminal that is gone is an error, of standard error too: none of them ends the run early."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "steep", "train", str(config), "--console.progress", progress],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    try:
        written = b""
        while b"step 1/" not in written:
            written += os.read(master, 65536)
        os.close(master)
        assert process.wait(timeout=120) == 129
    finally:
        process.kill()
    run = config.parent / "runs" / "small"
    assert read_json(run / "summary.json")["status"] == "interrupted"
    assert latest_step(run) == len([record for record in same_records(run) if record["kind"] == "train"]) < 9
    assert "run the same command again to continue" in (run / "console.log").read_text()
    assert_ends_like(whole, config)


def test_a_run_under_nohup_outlives_its_terminal(config: Path, whole: Path) -> None:
    with Steep("train", config, prepare_child=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        assert process.wait_for("step ", 2)
        process.send(signal.SIGHUP)
        assert process.finish() == 0, process.errors
    run = config.parent / "runs" / "small"
    assert (latest_step(run), same_records(run)) == (9, same_records(whole))


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> None:
    """A step of minutes: only leaving at once ends it before the test's patience."""
    mapping = small_run(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"global_batch_size": 100_000})
    with Steep("train", write_yaml(mapping, tmp_path / "run.yaml")) as process:
        assert process.wait_for("  heldout")  # scored at step 0: the next line is the sample, then step 0 begins
        assert process.wait_for("sample")
        time.sleep(2)
        process.press_ctrl_c()
        process.wait_for_error("Ctrl-C again leaves at once")
        process.press_ctrl_c()
        assert process.finish(60) == 130
    assert process.errors.rstrip().endswith("the same command continues from the newest complete checkpoint")
    assert "Traceback" not in process.errors
    assert not list((tmp_path / "runs" / "small" / "checkpoints").iterdir())
    assert read_lock_is_free(tmp_path / "runs" / "small")


def read_lock_is_free(run: Path) -> bool:
    from steep.core.lock import RunLock

    with RunLock(run):
        return True


@pytest.mark.parametrize(
    ("line", "number", "code"),
    [
        pytest.param("device ", signal.SIGINT, 130, id="while_data_and_model_are_loaded"),
        pytest.param("device ", signal.SIGTERM, 143, id="terminated_while_loading"),
        pytest.param("  no_decay", signal.SIGINT, 130, id="while_the_base_is_scored"),
    ],
)
def test_ctrl_c_before_the_first_step(
    line: str, number: signal.Signals, code: int, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    """Nothing to save: the command leaves without a step, a traceback or a wait."""
    mapping = small_run(
        tmp_path, corpus_directory, tiny_tokenizer_directory,
        data={
            "sequence_length": 64, "train": [{"path": str(corpus_directory)}], "cache_directory": str(tmp_path / "cache"),
            "validation": {"heldout": {"path": str(corpus_directory)}},
        },
        evaluate={"tokens": "10M"},
    )  # fmt: skip
    with Steep("train", write_yaml(mapping, tmp_path / "run.yaml")) as process:
        assert process.wait_for(line)
        process.press_ctrl_c() if number == signal.SIGINT else process.send(number)
        assert process.finish() == code, process.errors
    said = [line for line in process.errors.splitlines() if not line.startswith("preparing text:")]
    assert said == ["interrupted"]
    assert "step " not in process.output
    assert "held-out" not in process.output


def test_ctrl_c_while_text_is_prepared(tmp_path: Path, documents: list[str], tiny_tokenizer_directory: Path) -> None:
    corpus = tmp_path / "big"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"{number} " + "\n".join(documents), encoding="utf-8")
    config = write_yaml(small_run(tmp_path, corpus, tiny_tokenizer_directory), tmp_path / "run.yaml")
    with Steep("train", config) as process:
        assert process.wait_for("device ")
        prepared = tmp_path / "cache" / "prepared"
        while not prepared.exists() or not any(prepared.rglob(".partial-*")):
            assert process.process.poll() is None, process.errors
            time.sleep(0.01)
        process.press_ctrl_c()
        assert process.finish() == 130
    assert process.errors.strip().split("\n")[-1] == "interrupted"
    assert "Traceback" not in process.errors


@pytest.mark.slow
def test_a_signal_during_evaluation_does_not_wait_for_it(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    """What the signal cut short is scored by the resumed process, so that the records equal the uninterrupted run's."""
    found = {}
    for name in ("whole", "stopped"):
        mapping = small_run(
            tmp_path, corpus_directory, tiny_tokenizer_directory, run={"name": name}, train={"steps": 4},
            evaluate={"every_steps": 2, "tokens": "15k"}, checkpoint={"every_steps": 4},
            data={"sequence_length": 64, "train": [{"path": str(corpus_directory)}], "cache_directory": str(tmp_path / "cache"),
                  "validation": {"heldout": {"share": 0.3}}},
        )  # fmt: skip
        config, run = write_yaml(mapping, tmp_path / f"{name}.yaml"), tmp_path / "runs" / name
        if name == "stopped":
            with Steep("train", config) as process:
                assert process.wait_for("step 1/")
                process.send(signal.SIGTERM)
                assert process.finish() == 143, process.errors
            assert latest_step(run) == 2
            assert [r["step"] for r in same_records(run) if r["kind"] == "evaluate"] == [0]
        assert steep("train", str(config)).returncode == 0
        found[name] = same_records(run), final_weights(run)
    assert found["stopped"] == found["whole"]
    assert [r["step"] for r in found["whole"][0] if r["kind"] == "evaluate"] == [0, 2, 4]


@pytest.mark.parametrize("scores", [False, True])
def test_a_signal_during_the_last_step(
    scores: bool,
    tmp_path: Path,
    corpus_directory: Path,
    tiny_tokenizer_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is done, unless it still has texts to score: scoring is not waited for."""
    mapping = small_run(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"steps": 3}, evaluate={})
    mapping["evaluate"]["prompts"] = []
    if not scores:
        mapping["data"]["validation"] = {}
    train_step, made = TorchEngine.train_step, []

    def signalled(*given: Any) -> Any:
        made.append(train_step(*given))
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return made[-1]

    monkeypatch.setattr(TorchEngine, "train_step", signalled)
    result = train(load_run_config(mapping=mapping), stream=io.StringIO())
    console = (result.run_directory / "console.log").read_text()
    assert latest_step(result.run_directory) == 3
    assert ("saving, then leaving" in console) == scores
    assert f"{'interrupted' if scores else 'done'} at step 3 of 3: " in console
    assert (result.status, result.exit_code) == (("interrupted", 130) if scores else ("done", 0))


def test_a_time_limit_saves_and_leaves(config: Path, whole: Path) -> None:
    for _ in range(2):
        result = steep("train", str(config), "--train.max_seconds", "0.001")
        assert result.returncode == 0, result.stderr
    run = config.parent / "runs" / "small"
    assert latest_step(run) == 2
    assert "run the same command again to continue" in result.stdout
    assert_ends_like(whole, config)
