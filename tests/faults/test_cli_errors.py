"""The command line from outside: exit codes, one message per mistake, no traceback, plain text in a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steep.config.load import load_run_config
from steep.training.loop import train
from support import run_mapping, steep, write_yaml

COMMANDS = ["prepare", "plan", "train", "evaluate", "generate", "export", "report", "inspect", "schema", "demo"]
HEAVY = ("torch", "transformers", "pyarrow", "matplotlib", "numpy")


@pytest.fixture(scope="module")
def mapping(
    tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> dict[str, Any]:
    return run_mapping(tmp_path_factory.mktemp("cli"), corpus_directory, tiny_tokenizer_directory, train={"steps": 2})


@pytest.fixture(scope="module")
def config(mapping: dict[str, Any]) -> Path:
    return write_yaml(mapping, Path(mapping["run"]["directory"]).parent / "run.yaml")


@pytest.fixture(scope="module")
def run(mapping: dict[str, Any]) -> Path:
    """A finished run."""
    import io

    return train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=lambda a: " ".join(a) or "steep")
def test_help_is_light(arguments: list[str]) -> None:
    program = (
        "import sys; from steep.cli.main import run; code = run(sys.argv[1:]); "
        f"assert not set(sys.modules) & set({HEAVY!r}), set(sys.modules) & set({HEAVY!r}); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout
    assert "\x1b" not in result.stdout
    assert not result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian", "{config}"], "Did you mean 'train'?"),
        (["train"], "Missing argument 'config'"),
        (["train", "{config}l"], "did you mean"),
        (["train", "{config}", "--resum"], "--resume"),
        (["train", "{config}", "extra"], "unexpected extra argument"),
        (["train", "{config}", "--optimizer.learning_rat", "1"], "did you mean --optimizer.learning_rate?"),
        (["train", "{config}", "--train.steps", "many"], "train.steps"),
        (["train", "{config}", "--train.steps"], "has no value"),
        (["plan", "{config}", "--device", "h1000"], "h100"),
        (["schema", "--a.b", "1"], "takes no configuration overrides"),
        (["report", "{run}", "--a.b", "1"], "takes no configuration overrides"),
        (["inspect", "nonsense"], "there is nothing"),
        (["inspect", "{config}"], "this is none of them"),
        (["report", "nonsense"], "no such run directory"),
        (["report", "{directory}"], "is not a run directory"),
        (["evaluate", "{tokenizer}"], "name at least one text"),
        (["generate", "{run}"], "--prompt"),
        (["generate", "{run}", "--prompt", ""], "the prompt is empty"),
        (["--bogus"], "No such option: --bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], named: str, config: Path, run: Path, tiny_tokenizer_directory: Path
) -> None:
    places = {"config": config, "run": run, "directory": config.parent, "tokenizer": tiny_tokenizer_directory}
    result = steep(*(argument.format(**places) for argument in arguments), cwd=config.parent)
    assert result.returncode == 2, result.stdout + result.stderr
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["train", "{config}"], ["lr-find", "{config}"], ["prepare", "{config}", "--tokenizer", "gpt2", "--out", "store"]],
    ids=lambda arguments: arguments[0],
)
def test_each_process_of_torchrun_ends_with_one_line(arguments: list[str], config: Path) -> None:
    result = steep(*(argument.format(config=config) for argument in arguments), cwd=config.parent, WORLD_SIZE="2")
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: WORLD_SIZE is 2: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not (config.parent / "store").exists()


def test_no_code_refuses_a_foreign_target(mapping: dict[str, Any], tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    (tmp_path / "model.py").write_text(f"open({str(marker)!r}, 'w')\ndef build(): ...\n")
    foreign = {"run": {**mapping["run"], "name": "foreign"}, "model": {"_target_": f"{tmp_path / 'model.py'}:build"}}
    config = write_yaml({**mapping, **foreign}, tmp_path / "run.yaml")
    for command in ("train", "plan"):
        result = steep(command, str(config), "--no-code")
        assert result.returncode == 2, result.stdout + result.stderr
        assert "--no-code" in result.stderr
        assert "Traceback" not in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    "place", [pytest.param("before", marks=pytest.mark.slow), "after", pytest.param("equals", marks=pytest.mark.slow)]
)
def test_overrides_before_and_after_the_file(place: str, config: Path) -> None:
    arguments = {
        "before": ["--train.steps", "9", "plan", str(config), "--json"],
        "after": ["plan", str(config), "--json", "--train.steps", "9"],
        "equals": ["plan", "--train.steps=9", "--json", str(config)],
    }[place]
    result = steep(*arguments)
    assert result.returncode == 0, result.stderr
    assert '"steps": 9' in result.stdout
    json.loads(result.stdout)


@pytest.mark.parametrize("what", ["run", "checkpoint", "model", "store"])
def test_inspect_says_what_is_there(what: str, run: Path) -> None:
    latest = run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text().strip()
    store = next((run.parent.parent / "cache" / "prepared").iterdir())
    path = {"run": run, "checkpoint": latest, "model": latest / "model" / "consolidated", "store": store}[what]
    as_json = steep("inspect", str(path), "--json")
    assert as_json.returncode == 0, as_json.stderr
    assert json.loads(as_json.stdout)
    as_text = steep("inspect", str(path))
    assert as_text.returncode == 0
    assert "\x1b" not in as_text.stdout


def test_evaluate_and_generate_in_a_pipe(run: Path) -> None:
    scores = steep("evaluate", str(run), "--tokens", "500", "--json")
    assert scores.returncode == 0, scores.stderr
    assert json.loads(scores.stdout)
    command = [sys.executable, "-m", "steep", "generate", str(run), "--prompt", "-", "--max-new-tokens", "4"]
    written = subprocess.run(command, input="The class", capture_output=True, text=True, timeout=300, check=False)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("The class")
    assert "\x1b" not in written.stdout + scores.stdout


def test_a_reader_that_leaves(config: Path, tmp_path: Path) -> None:
    """`steep schema | head -1` ends quietly; `steep train | head -1` trains to the end, with its lines in console.log."""
    for arguments in (["schema"], ["train", str(config), "--run.name", "unread"]):
        command = " ".join(["exec", sys.executable, "-m", "steep", *arguments])
        script = f"({command}; ) 2>{tmp_path}/errors | head -1; exit ${{PIPESTATUS[0]}}"
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
        errors = (tmp_path / "errors").read_text()
        assert "Traceback" not in errors
        assert "BrokenPipe" not in errors
        assert result.stdout.count("\n") == 1
    assert result.returncode == 0
    log = (config.parent / "runs" / "unread" / "console.log").read_text()
    assert "standard output was closed" in log
    assert "done at step 2 of 2" in log
