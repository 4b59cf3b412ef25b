"""metrics.jsonl: whole lines, standard JSON, and nothing written twice after a resume. TensorBoard: scalars by name."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steep.core.errors import ConfigError
from steep.core.section import Target
from steep.runtime.ranks import Ranks
from steep.trackers.backends import jsonl
from steep.trackers.backends.jsonl import read_records, truncate_after
from steep.trackers.config import ConsoleConfig, TrackerConfig
from steep.trackers.run_trackers import Trackers
from steep.trackers.tracker import Tracker, build_tracker


def written(path: Path) -> list[dict]:
    """What an outside JSON reader sees: every line must parse by itself."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_is_in_the_file_before_the_next_is_logged(tmp_path: Path) -> None:
    tracker = jsonl.build()
    tracker.start(tmp_path, {})
    tracker.log({"kind": "train", "step": 0, "loss": 2.5})
    assert written(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 0, "loss": 2.5}]
    tracker.close()


def test_every_line_is_standard_json(tmp_path: Path) -> None:
    tracker = jsonl.build()
    tracker.start(tmp_path, {})
    tracker.log({"kind": "train", "step": 0, "loss": math.nan, "grad_norm": math.inf, "parts": [math.nan, 1]})
    tracker.log({"kind": "sample", "step": 0, "text": "line\nbreak \x00 \ud800 \u2028 🦜"})
    tracker.close()
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().decode().split("\n")[:-1]]
    assert first == {"kind": "train", "step": 0, "loss": None, "grad_norm": None, "parts": [None, 1]}
    assert second["text"] == "line\nbreak \x00 ? \u2028 🦜"


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    losses = [0.1 + 0.2, 1 / 3, 5e-324, 2.9131574630737305]
    tracker = jsonl.build()
    tracker.start(tmp_path, {})
    for step, loss in enumerate(losses):
        tracker.log({"kind": "train", "step": step, "loss": loss})
    tracker.close()
    assert [record["loss"] for record in read_records(tmp_path / "metrics.jsonl")] == losses


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from steep.trackers.backends import jsonl\n"
        "tracker = jsonl.build(); tracker.start(Path(sys.argv[1]), {})\n"
        "for step in range(100): tracker.log({'kind': 'train', 'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [record["step"] for record in written(tmp_path / "metrics.jsonl")] == list(range(100))


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"\x00" * 70_000, b'{"kind": "train", "step": 2}'])
def test_a_torn_last_line_is_cut_off_when_the_file_is_opened_again(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 0}\n{"kind": "train", "step": 1}\n' + torn)
    tracker = jsonl.build()
    tracker.start(tmp_path, {})
    tracker.log({"kind": "train", "step": 2})
    tracker.close()
    assert [record["step"] for record in written(path)] == [0, 1, 2]


def test_truncating_drops_what_the_resumed_run_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = jsonl.build()
    tracker.start(tmp_path, {})
    tracker.log({"kind": "evaluate", "step": 0, "text": "domain"})
    for step in range(6):
        tracker.log({"kind": "train", "step": step})
        if step == 2:
            tracker.log({"kind": "evaluate", "step": 3, "text": "domain"})
    tracker.log({"kind": "evaluate", "step": 6, "text": "domain"})
    tracker.log({"kind": "sample", "step": 6, "prompt": "", "text": ""})
    tracker.log({"kind": "event", "step": 6, "message": "interrupted"})
    tracker.close()

    assert truncate_after(path, 3) == 5
    kept = [(record["kind"], record["step"]) for record in written(path)]
    assert kept == [("evaluate", 0), *[("train", step) for step in (0, 1, 2)], ("evaluate", 3), ("event", 6)]
    before = path.stat().st_ino
    assert truncate_after(path, 3) == 0
    assert path.stat().st_ino == before, "a file with nothing to drop is not written again"


def test_truncating_to_the_start_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 0) == 0
    assert not path.exists()
    path.write_bytes(b'{"kind": "evaluate", "step": 0}\n{"kind": "train", "step": 0}\nnot json\n')
    assert truncate_after(path, 0) == 2
    assert written(path) == [{"kind": "evaluate", "step": 0}]
    assert not list(tmp_path.glob(".partial-*"))


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = build_tracker("tensorboard")
    tracker.start(tmp_path, {})
    for step in range(3):
        tracker.log({"kind": "train", "step": step, "loss": 3.0 - step, "mfu": None, "grad_norm": math.nan})
    tracker.log({"kind": "evaluate", "step": 3, "text": "domain", "bits_per_byte": 0.75, "perplexity": 4.0})
    tracker.log({"kind": "evaluate", "step": 3, "text": "general", "bits_per_byte": 0.5})
    tracker.log({"kind": "sample", "step": 3, "prompt": "The", "text": " end"})
    tracker.log({"kind": "event", "step": 3, "message": "done"})
    tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "train/loss": [(0, 3.0), (1, 2.0), (2, 1.0)],
        "evaluate/domain/bits_per_byte": [(3, 0.75)],
        "evaluate/domain/perplexity": [(3, 4.0)],
        "evaluate/general/bits_per_byte": [(3, 0.5)],
    }


def test_tensorboard_without_its_package_names_the_extra(tmp_path: Path) -> None:
    """A real interpreter in which the package cannot be found, because its import path leaves it out."""
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Without(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name == 'tensorboard' else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]\n"
        "from steep.core.errors import MissingExtraError\n"
        "from steep.trackers.tracker import build_tracker\n"
        "try: build_tracker('tensorboard')\n"
        "except MissingExtraError as error: print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "pip install 'steep[tensorboard]'" in answer


def test_an_unknown_tracker_or_argument_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no 'tensorbord'. Did you mean 'tensorboard'\?"):
        build_tracker("tensorbord")
    with pytest.raises(ConfigError, match=r"'folder'.*It takes: directory, flush_seconds"):
        build_tracker("tensorboard", folder="x")


def everything(directory: Path, ranks: Ranks) -> tuple[str, list[Target]]:
    """What the console shows of a run that uses every method, and the targets that were built."""
    built: list[Target] = []

    def build_target(target: Target) -> Tracker:
        built.append(target)
        return jsonl.build()

    stream = io.StringIO()
    others = [TrackerConfig(name="jsonl"), Target(_target_="mine.build")]
    with Trackers(
        directory, {}, others, ConsoleConfig(), stream=stream, build_target=build_target, ranks=ranks
    ) as trackers:
        trackers.line("a line")
        trackers.start_configured({})
        trackers.expect_steps(2, 0)
        trackers.log_all([{"kind": "train", "step": 0, "loss": 2.5}])
        trackers.rewind(1)
        trackers.flush()
    return stream.getvalue(), built


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    assert everything(tmp_path / "other", Ranks(rank=1, world=2)) == ("", [])
    assert not (tmp_path / "other").exists()
    shown, built = everything(tmp_path / "first", Ranks(rank=0, world=2))
    assert [line.split(" | ")[:2] for line in shown.splitlines()] == [["a line"], ["step 0/2", "loss 2.500"]]
    assert [target.target for target in built] == ["mine.build"]
    assert (
        len(list(read_records(tmp_path / "first" / "metrics.jsonl"))) == 3
    )  # metrics.jsonl and the two that write there too
