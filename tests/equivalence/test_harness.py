"""`steep evaluate --harness`: a task file and its data on disk, run by lm-eval on a run, against transformers' numbers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.config.load import load_run_config
from steep.core.errors import ConfigError, MissingExtraError
from steep.evaluation.harness import evaluate_tasks, find_tasks
from steep.training.loop import train
from support import run_mapping, steep

QUESTIONS = [
    {"question": f"The {thing} statement", "choices": [" is used", " zebra", " 12345"], "answer": number % 3}
    for number, thing in enumerate(("if", "while", "for", "try", "with", "def", "class", "return", "yield"))
]

TASK = """\
task: keywords
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "keywords.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    (folder / "keywords.yaml").write_text(TASK.format(data=json.dumps(str(data))), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path) -> Path:
    directory = tmp_path_factory.mktemp("harness")
    mapping = run_mapping(directory, corpus_directory, tiny_tokenizer_directory, train={"steps": 20})
    return train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory


def accuracy(folder: Path) -> float:
    """What transformers gives: the choice with the largest summed log-probability after the question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    right = 0
    for question in QUESTIONS:
        sums = []
        context = tokenizer.encode(str(question["question"]))
        for choice in question["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer.encode(str(question["question"]) + choice)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(context), len(ids))))
        right += sums.index(max(sums)) == question["answer"]
    return right / len(QUESTIONS)


def test_a_task_on_disk_gives_what_transformers_gives(run: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", str(run), "--harness", "keywords", "--harness-path", str(tasks), "--precision", "fp32")
    result = steep(*arguments, "--json", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    expected = accuracy(next(run.glob("checkpoints/*step_20/model/consolidated")))
    assert answer["results"]["keywords"]["acc,none"] == pytest.approx(expected)
    assert 0 < expected < 1
    assert answer["n-samples"]["keywords"]["effective"] == len(QUESTIONS)
    assert "task files may run code" in result.stderr


def test_limit_against_and_the_table(run: Path, tasks: Path) -> None:
    folder = next(run.glob("checkpoints/*step_18/model/consolidated"))
    result = evaluate_tasks(str(run), ["key*"], folder=tasks, limit=3, against=str(folder), precision="fp32")
    assert result.to_mapping()["n-samples"]["keywords"]["effective"] == 3
    assert result.to_mapping()["against_results"]["keywords"]["acc,none"] in (0.0, *(n / 3 for n in (1, 2, 3)))
    text = result.to_text()
    assert text.startswith("lm-eval ")
    assert "the first 3 documents of each task" in text
    assert text.count("|keywords|") == 2


def silent(text: str) -> None:
    pass


@pytest.mark.slow
def test_an_unknown_task_is_an_error_before_a_model_is_loaded(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="no task keywordz.*Similar: keywords"):
        evaluate_tasks("nowhere", "keywordz", folder=tasks, say=silent)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folder": "not/there"}, "is not a folder"),
        ({"allow_code": False}, "--no-code refuses it"),
        ({"tasks": " , "}, "name at least one task"),
    ],
)
def test_what_cannot_be_run_is_refused(tasks: Path, changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"tasks": "keywords", "folder": tasks, "allow_code": True, "say": silent, **changes}
    with pytest.raises(ConfigError, match=words):
        find_tasks(**given)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tasks: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"steep\[eval\]"):
        find_tasks("keywords", tasks, True, silent)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "3"], "--limit needs --harness TASKS"),
        (["text.jsonl", "--harness", "keywords"], "texts applies to texts"),
        (["--harness", "keywords", "--tokens", "5k"], "--tokens applies to texts"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from steep.cli.main import run as command

    assert command(["evaluate", "nowhere", *arguments]) == 2
    assert words in capsys.readouterr().err
