"""Ctrl-C while a command is still being imported, or anywhere else before training: one word, exit code 130, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import run_mapping, write_yaml

FIRST_IMPORTS, TYPER, COMMAND, LIBRARIES = 0.03, 0.1, 0.25, 0.8
"""CPU seconds of the process after which SIGINT is sent: the load of the machine does not move these instants by much."""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("after", [FIRST_IMPORTS, TYPER, COMMAND, LIBRARIES])
@pytest.mark.parametrize("command", ["train", "prepare", "plan", "generate"])
def test_ctrl_c_says_interrupted(
    command: str, after: float, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"steps": 10_000})
    config = str(write_yaml(mapping, tmp_path / "run.yaml"))
    # a pipe that is never written to keeps generate and prepare waiting once they are imported
    arguments = {
        "train": [config], "plan": [config], "generate": [config, "--prompt", "-"],
        "prepare": ["-", "--input-format", "jsonl", "--tokenizer", str(tiny_tokenizer_directory), "--out", str(tmp_path / "out")],
    }[command]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "steep", command, *arguments], text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    waited = time.monotonic()
    while process.poll() is None and cpu_seconds(process.pid) < after and time.monotonic() - waited < 20:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
