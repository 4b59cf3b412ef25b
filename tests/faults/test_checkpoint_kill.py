"""kill -9 at any instant of a run that saves all the time: what is found afterwards is whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steep.checkpoint.load import find_checkpoint, open_checkpoint
from steep.checkpoint.retention import collect_leftovers
from steep.core.files import TEMPORARY_PREFIX
from steep.core.lock import RunLock

# Saves as fast as it can, every tensor equal to the step; prints each event, so that a kill can aim inside a save.
SAVER = """
import sys, torch
from steep.core.lock import RunLock
from steep.checkpoint.load import find_checkpoint, open_checkpoint
from steep.checkpoint.manifest import checkpoint_name
from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.pieces import whole_pieces
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError
run, repeat = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
weights = {f"layer.{i}": torch.zeros(60_000) for i in range(8)}
moments = {f"layer.{i}.exp_avg": torch.zeros(60_000) for i in range(8)}
with RunLock(run):
    writer = CheckpointWriter(run + "/checkpoints", keep_last=2, on_event=lambda text: print(text, flush=True))
    try:
        step = open_checkpoint(find_checkpoint(run)).manifest.step
    except CheckpointError:
        step = 0
    print("ready", flush=True)
    while True:
        step += 1
        for tensor in (*weights.values(), *moments.values()):
            tensor.fill_(step)
        state = CheckpointState(whole_pieces(weights), whole_pieces(moments),
                                {"class": "SGD", "param_groups": [], "state": {}}, {}, "", step, step, step, "",
                                {"step": step}, {"config.json": b"{}"})
        for _ in range(repeat):  # more than once: the same step is replaced
            writer.save(checkpoint_name(0, step), state)
"""


def run_and_kill(run: Path, repeat: int, seed: int) -> tuple[list[str], int]:
    """Start the saver, kill it at a random instant, return its events and its exit code."""
    command = [sys.executable, "-c", SAVER, str(run), str(repeat)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    generator = random.Random(seed)
    events = []
    for _ in range(generator.randrange(3, 9)):  # after so many events, most of them "saving" or "saved"
        line = process.stdout.readline()
        assert line, process.stderr.read()
        events.append(line.strip())
    time.sleep(generator.uniform(0, 0.03))
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate()
    return events + rest.split("\n")[:-1], process.returncode


def assert_whole(run: Path, at_least: int) -> int:
    messages = []
    path = find_checkpoint(run, messages.append)
    checkpoint = open_checkpoint(path)
    step = checkpoint.manifest.step
    assert step >= at_least, messages
    assert checkpoint.train_state == {"step": step}
    for tensors in (checkpoint.model_tensors(), checkpoint.optimizer_tensors()):
        assert len(tensors) == 8
        assert all((tensor == step).all() for tensor in tensors.values())
    return step


def saved_step(events: list[str]) -> int:
    """The last step that the killed process said was saved."""
    return max((int(e.split("_step_")[1].split()[0]) for e in events if e.startswith("saved ")), default=0)


@pytest.mark.parametrize(
    "repeat", [pytest.param(1, id="new_steps"), pytest.param(2, id="replaced_steps", marks=pytest.mark.slow)]
)
def test_killed_at_random_instants(tmp_path, repeat):
    """20 kills over the two cases, each run going on from what the one before left."""
    inside, reached = 0, 0
    for seed in range(10):
        events, code = run_and_kill(tmp_path, repeat, seed + 100 * repeat)
        assert code == -signal.SIGKILL
        checkpoints = tmp_path / "checkpoints"
        inside += any(path.name.startswith(TEMPORARY_PREFIX) for path in checkpoints.iterdir())
        with RunLock(tmp_path):
            collect_leftovers(checkpoints, print)
        assert not list(checkpoints.glob(f"{TEMPORARY_PREFIX}*"))
        reached = assert_whole(tmp_path, max(reached, saved_step(events)))
    print(f"{inside} of 10 kills inside a save")
    assert inside >= 3, "too few kills fell inside a save for the test to mean anything"
