"""Code that lies in the current folder is not run: by the programs that steep starts, nor by git."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steep.core.child import module_path, python_command
from support import run_mapping, write_yaml

SHADOWED = ("json", "numpy", "transformers", "yaml", "runpy", "chardet", "sitecustomize")
"""Modules of the standard library, of dependencies, and some that libraries import only where they are there."""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that say that they ran by leaving a file `ran`."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def test_a_child_imports_nothing_of_the_current_folder(trap: Path) -> None:
    run = {"cwd": trap, "capture_output": True, "text": True, "check": True}
    done = subprocess.run(python_command("json.tool", "--help"), **run)  # type: ignore[call-overload]
    assert "usage" in done.stdout
    assert str(trap) not in module_path()
    assert "" not in module_path()
    assert not (trap / "ran").exists()
    subprocess.run(
        [sys.executable, "-m", "json.tool", "--help"], cwd=trap, capture_output=True
    )  # as it would have been
    assert (trap / "ran").exists()


def test_prepare_train_and_export_run_none_of_it(
    trap: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    prepared = python_command("steep", "prepare", str(corpus_directory), "--tokenizer", str(tiny_tokenizer_directory))
    subprocess.run([*prepared, "--out", "store", "--workers", "2"], cwd=trap, check=True, capture_output=True)
    mapping: dict[str, Any] = run_mapping(trap, corpus_directory, tiny_tokenizer_directory, train={"steps": 2})
    write_yaml(mapping, trap / "run.yaml")
    for command in (["plan", "run.yaml"], ["train", "run.yaml"], ["export", "runs/small"]):
        subprocess.run(python_command("steep", *command), cwd=trap, check=True, capture_output=True)
    assert (trap / "runs/small/export/hf/config.json").is_file()
    assert not (trap / "ran").exists()


@pytest.mark.parametrize("kind", ["filter", "fsmonitor"])
def test_git_runs_no_program_of_the_repository(kind: str, trap: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=trap, check=True, capture_output=True)

    git("init", "--quiet")
    git("-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet", "--allow-empty", "--message", "c")
    program = trap / "program"
    program.write_text(f"#!/bin/sh\ntouch {trap / 'ran'}\ncat\n", encoding="utf-8")
    program.chmod(0o755)
    if kind == "filter":
        (trap / "text").write_text("one")
        git("add", "text")
        git("-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet", "--message", "d")
        (trap / ".gitattributes").write_text("* filter=own")
        git("config", "filter.own.clean", str(program))
        os.utime(trap / "text", (1, 1))
    else:
        git("config", "core.fsmonitor", str(program))
    code = (
        "from steep.runtime.environment import describe_environment as d; import json; print(json.dumps(d([])['git']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; del sys.path[0]; {code}"],
        cwd=trap,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)
    assert not (trap / "ran").exists()
    git("status")  # as it would have been
    assert (trap / "ran").exists()
