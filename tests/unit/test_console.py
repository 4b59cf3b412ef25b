"""The console: lines that fit, plain text where there is no terminal, a bar where there is one, and all of it in console.log."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steep.trackers.backends import console, jsonl
from steep.trackers.config import ConsoleConfig

TRAIN = {"kind": "train", "step": 12, "loss": 2.9131, "grad_norm": 1.2142, "learning_rate": 4.9e-5,
         "tokens_per_second": 812.4, "tokens": 24576, "mfu": None, "memory_bytes": 1.9 * 2**30,
         "data_wait_seconds": 0.01, "eta_seconds": 80.0}  # fmt: skip


def started(directory: Path, **arguments: Any) -> tuple[console.ConsoleTracker, io.StringIO]:
    stream = io.StringIO()
    tracker = console.build(stream=stream, **arguments)
    tracker.start(directory, {})
    return tracker, stream


def scores(step: int, **texts: float) -> list[dict[str, Any]]:
    return [
        {
            "kind": "evaluate",
            "step": step,
            "text": text,
            "bits_per_byte": bits,
            "perplexity": 14.23,
            "nats_per_token": 2.6,
        }
        for text, bits in texts.items()
    ]


def test_the_whole_line() -> None:
    assert console.train_line(TRAIN, 40, 160) == (
        "step 12/40 | loss 2.913 | grad 1.21 | lr 4.9e-05 |   812 tok/s | 24.6k tokens |  1.9 GiB | "
        "data 0.0 s | ETA  1 min 20 s"
    ), "no column without a value: the MFU of a CPU"


@pytest.mark.parametrize("width", range(40, 201))
def test_a_line_fits_and_loses_the_least_important_columns_first(width: int) -> None:
    forecast = {"mfu": 0.412, "forecast_loss": 2.7013, "forecast_low": 2.6513, "forecast_high": 2.7613}
    line = console.train_line({**TRAIN, **forecast}, 40, width)
    assert len(line) <= width
    assert line.startswith("step 12/40 | loss 2.913")
    labels = {"eta_seconds": "ETA", "tokens_per_second": "tok/s", "grad_norm": "grad", "learning_rate": "lr",
              "memory_bytes": "GiB", "tokens": "tokens", "mfu": "MFU", "data_wait_seconds": "data",
              "forecast_loss": "ends at 2.701 (2.651 to 2.761)"}  # fmt: skip
    there = [label in line for label in (labels[name] for name in reversed(console.LEAST_IMPORTANT_FIRST))]
    assert there == sorted(there, reverse=True), "no column goes before a less important one"


def test_lines_of_a_run_stand_below_each_other() -> None:
    lines = [
        console.train_line(
            {**TRAIN, "step": step, "loss": loss, "tokens": tokens, "grad_norm": norm, "eta_seconds": eta}, 1000, 120
        )
        for step, loss, tokens, norm, eta in (
            (0, 10.82, 8192, 12.3, 7200.0), (12, 9.9996, 123_456, 1.0, 3599.0), (999, 2.1, 12_345_678, 0.31, 0.4),
        )
    ]  # fmt: skip
    bars = {tuple(index for index, char in enumerate(line) if char == "|") for line in lines}
    assert len(bars) == 1


def test_eighty_columns_hold_what_matters() -> None:
    line = console.train_line(TRAIN, 40, 80)
    for label in ("loss", "grad", "lr", "tok/s", "ETA"):
        assert label in line


def test_everything_printed_is_in_the_log_as_plain_text(tmp_path: Path) -> None:
    tracker, stream = started(tmp_path, width=80)
    tracker.expect_steps(40)
    tracker.line("the plan\nin two lines")
    for record in (*scores(0, domain=0.91), {**TRAIN, "step": 0}, {"kind": "event", "step": 0, "message": "saved"}):
        tracker.log(record)
    log = (tmp_path / "console.log").read_text(encoding="utf-8")
    assert log == stream.getvalue(), "the log is complete before the run ends"
    assert log.splitlines()[:2] == ["the plan", "in two lines"]
    assert "\x1b" not in log
    assert "\r" not in log
    tracker.close()
    again, _ = started(tmp_path, width=80)
    again.line("resumed")
    again.close()
    assert (tmp_path / "console.log").read_text(encoding="utf-8") == log + "resumed\n"


def test_the_first_line_appears_at_once_and_then_every_n_steps_and_the_last(tmp_path: Path) -> None:
    tracker, stream = started(tmp_path, log_every_steps=10, width=80)
    tracker.expect_steps(26, completed_steps=3)
    tracker.log({**TRAIN, "step": 3})
    assert stream.getvalue().startswith("step  3/26 | loss 2.913")
    for step in range(4, 26):
        tracker.log({**TRAIN, "step": step})
    assert [int(line[5:7]) for line in stream.getvalue().splitlines()] == [3, 10, 20, 25]


@pytest.mark.parametrize(
    ("step_seconds", "lines"),
    [
        (0.5, [0, 20, 40, 59]),
        (3.0, [*range(0, 58, 3), 59]),
        (8.0, list(range(60))),  # a line that waited for the next step would come after 16 seconds
        (60.0, list(range(60))),
    ],
)
def test_a_line_comes_about_every_ten_seconds(step_seconds: float, lines: list[int], tmp_path: Path) -> None:
    seconds = [100.0]
    tracker, stream = started(tmp_path, width=80, clock=lambda: seconds[0])
    tracker.expect_steps(60)
    for step in range(60):
        tracker.log({**TRAIN, "step": step})
        seconds[0] += step_seconds
    assert [int(line[5:7]) for line in stream.getvalue().splitlines()] == lines


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        pytest.param(2.85, 2.95, True, id="narrow: it stays where it is"),
        pytest.param(2.1, 2.8, True, id="wide, and the loss will fall"),
        pytest.param(2.5, 3.1, False, id="wide: it may rise or fall"),
        pytest.param(2.8, 2.8, False, id="no band: the last step is made"),
    ],
)
def test_a_forecast_that_says_nothing_is_not_printed(low: float, high: float, shown: bool, tmp_path: Path) -> None:
    tracker, stream = started(tmp_path, width=200)
    tracker.log({**TRAIN, "forecast_loss": (low + high) / 2, "forecast_low": low, "forecast_high": high})
    assert ("ends at" in stream.getvalue()) == shown


def test_an_evaluation_is_a_table_with_the_change_against_the_start(tmp_path: Path) -> None:
    tracker, stream = started(tmp_path, width=80)
    for record in (*scores(0, domain=0.91, general=0.95), *scores(40, domain=0.81, general=0.9595)):
        tracker.log(record)
    assert stream.getvalue().splitlines() == [
        "  held-out at 0    bits/byte  perplexity  change from the start",
        "  domain              0.9100       14.23",
        "  general             0.9500       14.23",
        "  held-out at 40   bits/byte  perplexity  change from the start",
        "  domain              0.8100       14.23  -0.1000 (-11.0 %), better",
        "  general             0.9595       14.23  +0.0095 (+1.0 %), worse",
    ]
    assert max(map(len, stream.getvalue().splitlines())) <= 80


def test_a_resumed_run_knows_the_scores_of_its_start(tmp_path: Path) -> None:
    metrics = jsonl.build()
    metrics.start(tmp_path, {})
    for record in (*scores(0, domain=0.91), {"kind": "train", "step": 0}, *scores(20, domain=0.85)):
        metrics.log(record)
    metrics.close()
    tracker, stream = started(tmp_path, width=80)
    for record in scores(40, domain=0.81):
        tracker.log(record)
    assert stream.getvalue().endswith("-0.1000 (-11.0 %), better\n")


def test_text_of_a_model_cannot_steer_the_terminal(tmp_path: Path) -> None:
    tracker, stream = started(tmp_path, width=60)
    tracker.log(
        {
            "kind": "sample",
            "step": 4,
            "prompt": "The\tend",
            "text": "\x1b[2J\x07\r\x9b31m\u202e \ud800🦜 " + "word " * 30,
        }
    )
    printed = stream.getvalue()
    assert all(char == "\n" or char.isprintable() for char in printed)
    assert "🦜" in printed
    assert max(map(len, printed.splitlines())) <= 60
    assert printed.splitlines()[0] == "sample at step 4:"


def test_a_stream_without_unicode_gets_question_marks(tmp_path: Path) -> None:
    raw = io.BytesIO()
    tracker = console.build(stream=io.TextIOWrapper(raw, encoding="ascii"), width=160)
    tracker.start(tmp_path, {})
    tracker.log({"kind": "event", "message": "pages 1–2"})
    assert b"pages 1?2" in raw.getvalue()
    assert "pages 1–2" in (tmp_path / "console.log").read_text(encoding="utf-8")


def test_the_fields_of_the_configuration_are_the_arguments(tmp_path: Path) -> None:
    tracker = console.build(**ConsoleConfig(log_every_steps=5, width=90).model_dump(), stream=io.StringIO())
    assert (tracker.log_every_steps, tracker.log_every_seconds, tracker.width) == (5, 10.0, 90)


RUN = """
import sys
from pathlib import Path
from steep.trackers.backends import console
tracker = console.build(progress=sys.argv[2], log_every_seconds=0)
tracker.start(Path(sys.argv[1]), {})
tracker.expect_steps(3)
for step in range(3):
    tracker.log({"kind": "train", "step": step, "loss": 2.5, "eta_seconds": 3.0})
tracker.close()
print("after")
"""


def on_a_terminal(directory: Path, progress: str, term: str = "xterm-256color") -> str:
    """What a program that believes to be on a terminal of 80 columns writes to it."""
    import pty

    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-c", RUN, str(directory), progress]
    process = subprocess.Popen(command, stdout=slave, stdin=slave, stderr=subprocess.PIPE, env=environment)
    os.close(slave)
    written = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # Linux says "input/output error" where the other end is closed
            break
        if not block:
            break
        written += block
    os.close(master)
    assert process.wait() == 0, process.stderr.read() if process.stderr else ""
    assert process.stderr is not None
    process.stderr.close()
    return written.decode()


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_a_terminal_gets_a_bar_below_the_lines(tmp_path: Path) -> None:
    written = on_a_terminal(tmp_path, "auto")
    assert "\x1b[" in written
    assert "3 of 3 steps" in written
    for step in range(3):
        assert f"step {step}/3 | loss 2.500" in written
    assert written.rstrip().endswith("after")
    log = (tmp_path / "console.log").read_text(encoding="utf-8")
    assert [line[:8] for line in log.splitlines()] == ["step 0/3", "step 1/3", "step 2/3"]
    assert "\x1b" not in log


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
@pytest.mark.parametrize(("progress", "term"), [("plain", "xterm"), ("bar", "dumb")])
def test_a_terminal_without_a_bar_gets_no_control_codes(tmp_path: Path, progress: str, term: str) -> None:
    assert "\x1b" not in on_a_terminal(tmp_path, progress, term)


@pytest.mark.parametrize("progress", ["auto", "bar", "plain"])
def test_a_pipe_gets_no_control_codes_whatever_is_asked(tmp_path: Path, progress: str) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-c", RUN, str(tmp_path), progress]
    written = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    assert b"\x1b" not in written
    assert b"\r" not in written.replace(os.linesep.encode(), b"\n")
    assert written.count(b"loss 2.500") == 3
