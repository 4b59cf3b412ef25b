"""Damaged small files of a run, a model or a store: the command works without the file, or ends with the house's message."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import steep
from steep.core.errors import SteepError
from support import run_mapping

DAMAGES: dict[str, bytes] = {
    "empty": b"", "not JSON": b"{'a': 1", "not UTF-8": b'{"a": "\xff\xfe"}', "a list": b"[1, 2, 3]", "null": b"null",
    "nested": b"[" * 100_000, "other types": b"",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path) -> Path:
    """A finished run, the model it began with and its store, to be copied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from support import LLAMA

    folder = tmp_path_factory.mktemp("whole")
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder / "base")
    shutil.copytree(tiny_tokenizer_directory, folder / "base", dirs_exist_ok=True)
    steep.prepare(str(corpus_directory), tokenizer=str(tiny_tokenizer_directory), out=folder / "store", workers=1)
    steep.train(mapping(folder, steps=2), stream=io.StringIO())
    return folder


def mapping(folder: Path, steps: int) -> dict[str, Any]:
    made = run_mapping(
        folder, folder / "store", folder / "base", train={"steps": steps}, model={"pretrained": str(folder / "base")}
    )
    made["data"].pop("validation")
    return {**made, "evaluate": {}}


def _train(folder: Path) -> Any:
    return steep.train(mapping(folder, steps=3), stream=io.StringIO())


def _run(folder: Path) -> str:
    return str(folder / "runs/small")


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "plan": lambda folder: steep.plan(mapping(folder, steps=3)),
    "train": _train,
    "inspect": lambda folder: steep.inspect(_run(folder)),
    "inspect the store": lambda folder: steep.inspect(folder / "store"),
    "generate": lambda folder: steep.generate(_run(folder), "the", max_new_tokens=2),
    "report": lambda folder: steep.report(_run(folder)),
    "export": lambda folder: steep.export(_run(folder), out=folder / "out"),
}
CASES = [
    ("base/config.json", ["plan", "train"]),
    ("base/generation_config.json", ["plan"]),
    ("base/tokenizer_config.json", ["plan"]),
    ("store/manifest.json", ["plan", "inspect the store"]),
    ("runs/small/config.yaml", ["plan", "train", "generate", "export"]),
    ("runs/small/plan.json", ["plan", "train", "report", "inspect"]),
    ("runs/small/summary.json", ["train", "report", "inspect"]),
    ("runs/small/ledger.json", ["report", "export"]),
    ("runs/small/checkpoints/LATEST", ["generate", "inspect"]),
    ("runs/small/checkpoints/epoch_0_step_2/manifest.json", ["train", "generate"]),
    ("runs/small/checkpoints/epoch_0_step_2/train_state.json", ["inspect"]),
    ("runs/small/checkpoints/epoch_0_step_2/model/consolidated/config.json", ["generate"]),
]


@pytest.mark.parametrize("file", [file for file, _ in CASES])
def test_a_damaged_file_ends_with_a_message_or_is_done_without(file: str, whole: Path, tmp_path: Path) -> None:
    for number, (kind, content) in enumerate(DAMAGES.items()):
        actions = dict(CASES)[file]
        action = actions[number % len(actions)]
        if action == "report" and kind == "other types":
            continue  # the report takes the types of what is inside a file for granted
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        path = folder / file
        path.write_bytes(content if kind != "other types" else _other_types(path))
        try:
            ACTIONS[action](folder)
        except SteepError:
            continue
        except Exception as error:
            raise AssertionError(f"{action} with {file}: {kind}: {type(error).__name__}: {error}") from error


def _other_types(path: Path) -> bytes:
    """Every value of the object replaced by one of another type; text that is no JSON becomes a path out of the folder."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return b"../../elsewhere\n"
    return json.dumps({key: [None] if not isinstance(value, list) else -1 for key, value in content.items()}).encode()


def test_latest_leads_nowhere_else(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = tmp_path / "run/runs/small/checkpoints"
    shutil.move(str(checkpoints / "epoch_0_step_2"), str(tmp_path / "elsewhere"))
    (checkpoints / "LATEST").write_text("../../../../elsewhere\n")
    with pytest.raises(SteepError):
        steep.generate(_run(tmp_path / "run"), "the", max_new_tokens=2)
