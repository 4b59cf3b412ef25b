"""The command line: what is an override, what is an option, and what a mistake in either suggests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import steep
from steep.cli.main import run, split_overrides
from steep.config.load import load_run_config
from steep.core.errors import ConfigError

OPTIONS = {"--resume", "--no-resume", "--no-code", "--device", "--help", "-h"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("text")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{pretrained: some/model}}\ndata: {{train: [{{path: {tmp_path / 'text.txt'}}}]}}\n")
    return file


def test_whole_sections_are_overrides(config: Path) -> None:
    arguments = ["train", str(config), "--trackers", "[{name: jsonl}]", "--no-code", "--optimizer={learning_rate: 1e-3}",
                 "--recipe", "pretraining", "--optimizer.eps", "1e-9"]  # fmt: skip
    plain, overrides = split_overrides(arguments, OPTIONS)
    assert plain == ["train", str(config), "--no-code"]
    found = load_run_config(config, overrides)
    assert [tracker.name for tracker in found.trackers] == ["jsonl"]  # type: ignore[union-attr]
    assert (found.recipe, found.optimizer.learning_rate, found.optimizer.eps) == ("pretraining", 1e-3, 1e-9)  # type: ignore[union-attr]


def test_options_stay_options_and_misspelt_ones_are_typers(config: Path) -> None:
    for option in ("--resume", "--resum", "--no_code", "--devise", "-h", "--", "--help"):
        assert split_overrides(["train", option], OPTIONS) == (["train", option], [])
    assert split_overrides(["prepare", "--learning_rate", "1"], None) == (["prepare", "--learning_rate", "1"], [])


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("--learning_rate 1e-4", "--optimizer.learning_rate"),
        ("--learning-rate=1e-4", "--optimizer.learning_rate"),
        ("--lr 1e-4", "--optimizer.learning_rate"),
        ("--lora_rank 8", "--adapter.rank"),
        ("--per-device-train-batch-size 2", "--train.micro_batch_size"),
        ("--every_steps 10", "--checkpoint.every_steps or --evaluate.every_steps"),
        ("--name mine", "--run.name or --data.train.0.name"),
        ("--tracker jsonl", "--trackers"),
        ("--nonsense 1", "The sections are: run, recipe"),
    ],
)
def test_a_key_without_its_section_suggests_it(
    config: Path, override: str, suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(config), *override.split()]) == 2
    assert suggestion in capsys.readouterr().err


def test_what_a_section_needs_is_said(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"write \[\{name: jsonl\}\]"):
        load_run_config(config, ["--trackers", "jsonl"])


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([option]) == 0
    assert capsys.readouterr().out == f"steep {steep.__version__}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_runs_and_keys(tmp_path: Path) -> None:
    """The script that --install-completion installs, run by bash as at the tab key."""
    (tmp_path / "steep").write_text(f'#!/bin/sh\nexec {sys.executable} -m steep "$@"\n')
    (tmp_path / "steep").chmod(0o755)
    for name in ("first", "second"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "runs" / "no_run").mkdir()
    lines = {
        "steep tra": "train",
        "steep train run.yaml --res": "--resume",
        "steep train run.yaml --train.steps 3 --optimizer.le": "--optimizer.learning_rate",
        "steep generate ": "runs/first runs/second",
        "steep report runs/s": "runs/second",
    }
    script = ["source <(_STEEP_COMPLETE=source_bash steep)"]
    for line in lines:
        words = " ".join(f"'{word}'" for word in line.split(" "))
        script.append(
            f'COMP_WORDS=({words}); COMP_CWORD={line.count(" ")}; _steep_completion steep; echo "${{COMPREPLY[*]}}"'
        )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.stderr
    assert dict(zip(lines, done.stdout.splitlines(), strict=True)) == lines
