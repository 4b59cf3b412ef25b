"""The end-of-text audit: data by hand, the model against transformers document by document, files, and words."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import steep
from steep.config.load import load_run_config
from steep.core.say import tell
from steep.data.held_out_text import HeldOutText
from steep.evaluation.end_of_text import (
    END_TOKENS,
    EndOfTextAudit,
    SourceEnds,
    StopScore,
    data_warnings,
    measure_stops,
    named_ids,
    source_ends,
)
from steep.models.attention_choice import prepare_lm_loss
from steep.models.fresh import build_fresh
from steep.training.loop import train
from support import LLAMA, run_mapping

EOS = 3


class Documents:
    """A store of given documents."""

    text_bytes = None

    def __init__(self, documents: list[list[int]]):
        self.tokens = documents
        self.num_documents = len(documents)
        self.document_lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)

    def read(self, document: int, start: int, count: int, out: Any) -> None:
        out[:] = self.tokens[document][start : start + count]


TOKENIZER: Any = SimpleNamespace(eos_id=EOS, append_eos=True)


def ended(store: Any, document_mask: bool = True) -> SourceEnds:
    [source] = source_ends(["s"], [store], TOKENIZER, document_mask)
    return source


# ── the data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_documents_that_end_with_eos_by_hand() -> None:
    assert ended(Documents([[5, EOS], [6, 7, EOS], [EOS, 8], [9]])) == SourceEnds("s", 4, 0.5)
    assert ended(Documents([[5], [EOS, 6]])) == SourceEnds("s", 2, 0.0)


def test_eos_before_documents_ends_them_where_documents_see_each_other() -> None:
    """nanoGPT and llm.c write it so; without the document mask the token after the last one is the next document's first."""
    store = Documents([[EOS, 5], [EOS, 6, 7]])
    assert ended(store, document_mask=True).ended_ratio == 0.0
    assert ended(store, document_mask=False).ended_ratio == 1.0


def test_of_a_large_source_some_documents_from_all_over_are_looked_at() -> None:
    documents = [[1, EOS]] * 5000 + [[1, 2]] * 5000
    assert ended(Documents(documents)) == SourceEnds("s", 2000, 0.5)


def test_a_stream_ends_as_the_tokenizer_section_says() -> None:
    stream: Any = SimpleNamespace(num_documents=0)
    assert ended(stream) == SourceEnds("s", None, 1.0)


def test_warnings_of_the_data() -> None:
    ends = [
        SourceEnds("a", 100, 1.0),
        SourceEnds("b", 1000, 0.995),
        SourceEnds("c", 100, 0.5),
        SourceEnds("d", 100, 0.0),
    ]
    some, none = data_warnings(ends, "<eos>")
    assert some.startswith("only 50.0 % of the documents of c end with <eos>")
    assert none.startswith("no document of d ends with <eos>: the model will not learn to stop")


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_model_is_asked_after_the_last_token_before_eos() -> None:
    """Documents with EOS, without it, of EOS alone, and longer than a sequence."""
    store = Documents([[10, 11, EOS], [20, 21, 22, 23], [EOS], [*range(30, 50), EOS], [60, EOS]])
    asked: list[int] = []

    def logits_at(batch: Any, places: torch.Tensor) -> torch.Tensor:
        ids = batch.input_ids.flatten()[places].tolist()
        asked.extend(ids)
        logits = torch.zeros(len(ids), 4)
        logits[:, EOS] = torch.tensor([9.0 if token in (11, 49) else -9.0 for token in ids])
        return logits

    score = measure_stops(logits_at, [HeldOutText("t", [(store, np.arange(5))])], EOS, sequence_length=8, batch_size=2)
    assert asked == [11, 23, 49, 60]
    assert score is not None
    assert (score.documents, score.stop_ratio) == (4, 0.5)
    assert score.eos_probability == pytest.approx(0.5, abs=1e-3)


def test_nothing_to_ask() -> None:
    def never(batch: Any, places: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked")

    text = HeldOutText("t", [(Documents([[EOS]]), np.arange(1))])
    assert measure_stops(never, [text], EOS, sequence_length=8, batch_size=2) is None
    assert measure_stops(never, [text], None, sequence_length=8, batch_size=2) is None


@pytest.mark.parametrize("attention", ["document", "sdpa"])
def test_probabilities_equal_those_of_transformers_document_by_document(attention: str) -> None:
    generator = np.random.default_rng(0)
    documents = [[*generator.integers(4, 512, length).tolist(), EOS] for length in (3, 17, 40, 1, 90, 30)]
    model = build_fresh(LLAMA, None, 1).eval()
    expected = []
    for tokens in documents:
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-65:-1]])).logits[0, -1]
        expected.append(float(logits.softmax(-1)[EOS]))
    lm_loss = prepare_lm_loss(model, tell, attention=attention)
    text = HeldOutText("t", [(Documents(documents), np.arange(len(documents)))])
    score = measure_stops(lm_loss.logits_at, [text], EOS, sequence_length=64, batch_size=2)
    assert score is not None
    assert END_TOKENS > 64
    assert score.eos_probability == pytest.approx(np.mean(expected), rel=1e-4)


# ── the files, and the words ─────────────────────────────────────────────────────────────────────────────────────────


def test_ids_that_files_name() -> None:
    files = {
        "generation_config.json": b'{"eos_token_id": [3, 7]}',
        "config.json": b'{"eos_token_id": 2}',
        "tokenizer_config.json": b'{"eos_token": {"content": "<end>"}}',
        "README.md": b"",
    }
    assert named_ids("checkpoint", files, {"<end>": 3}.get) == {
        "checkpoint/generation_config.json": [3, 7],
        "checkpoint/config.json": [2],
        "checkpoint/tokenizer_config.json": [3],
    }
    assert named_ids("x", {"config.json": b'{"eos_token_id": null}'}, {}.get) == {}
    assert named_ids("x", {"tokenizer_config.json": b"{}"}, {}.get) == {"x/tokenizer_config.json": []}
    assert named_ids("x", {"tokenizer_config.json": b'{"eos_token": "<gone>"}'}, {}.get) == {
        "x/tokenizer_config.json": []
    }


def made(**changes: Any) -> EndOfTextAudit:
    whole = {
        "eos_id": EOS, "eos_token": "<eos>", "sources": [SourceEnds("a", 10, 1.0)], "before": StopScore(50, 0.3, 0.5),
        "after": StopScore(50, 0.4, 0.6), "ids": {"tokenizer": [EOS], "model/config.json": [EOS, 9]},
    }  # fmt: skip
    return EndOfTextAudit(**{**whole, **changes})


def test_an_audit_with_nothing_off() -> None:
    assert made().warnings == []
    text = made().to_text()
    assert "a: 100.0 % of 10 documents end with it" in text
    assert "after:  probability 0.400 at the true ends of 50 held-out documents, stops at 60 % of them" in text
    assert "model/config.json 3 or 9" in text
    assert json.loads(json.dumps(made().to_mapping()))["after"] == {
        "documents": 50,
        "eos_probability": 0.4,
        "stop_ratio": 0.6,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eos_id": None, "eos_token": None}, "has no end-of-text token"),
        ({"sources": [SourceEnds("a", 10, 0.0)]}, "the model will not learn to stop"),
        ({"after": StopScore(50, 0.4, 0.39)}, "the stop rate fell from 50 % to 39 %"),
        (
            {"ids": {"tokenizer": [EOS], "export/hf/generation_config.json": [9]}},
            "export/hf/generation_config.json names 9",
        ),
    ],
)
def test_what_is_off_is_said(changes: dict[str, Any], words: str) -> None:
    [warning] = made(**changes).warnings
    assert words in warning
    assert f"warning: {warning}" in made(**changes).to_text()


def test_a_stop_rate_that_falls_a_little_is_no_news() -> None:
    assert made(after=StopScore(50, 0.4, 0.4)).warnings == []


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lists(start: int) -> str:
    """Documents of which every one ends in the same way."""
    lines = (
        json.dumps({"text": f"{n}: " + " ".join(str((n * k) % 97) for k in range(2, 9)) + " so it ends."})
        for n in range(start, start + 80)
    )
    return "\n".join(lines)


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_run_learns_to_stop_from_eos_and_not_without_it(
    append_eos: bool, tmp_path: Path, tiny_tokenizer_directory: Path
) -> None:
    (tmp_path / "train.jsonl").write_text(lists(100), encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text(lists(300), encoding="utf-8")
    mapping = run_mapping(
        tmp_path,
        tmp_path,
        tiny_tokenizer_directory,
        data={
            "train": [{"path": str(tmp_path / "train.jsonl"), "name": "lists"}],
            "validation": {"domain": {"path": str(tmp_path / "held_out.jsonl")}},
        },
        train={"steps": 50, "global_batch_size": 8},
        optimizer={"learning_rate": 1e-2},
        checkpoint={"every_steps": 100},
        report={"enabled": True},
    )
    mapping["tokenizer"]["append_eos"] = append_eos
    mapping["evaluate"] = {"tokens": 5_000}  # the ends may have half as many
    console = io.StringIO()
    run = train(load_run_config(mapping=mapping), stream=console).run_directory
    audit = json.loads((run / "summary.json").read_text())["end_of_text"]
    assert audit["before"]["documents"] == audit["after"]["documents"] == 48
    assert audit["before"]["stop_ratio"] < 0.1
    page = (run / "report.html").read_text()
    assert "End of text" in page
    if append_eos:
        assert audit["sources"] == [{"source": "lists", "documents": 80, "ended_ratio": 1.0}]
        assert audit["after"]["stop_ratio"] > 0.9
        assert audit["warnings"] == []
        assert all(0 in ids for ids in audit["ids"].values())
        assert set(audit["ids"]) >= {
            "tokenizer",
            "checkpoint/generation_config.json",
            "checkpoint/tokenizer_config.json",
        }
    else:
        assert audit["after"]["stop_ratio"] == 0.0
        assert audit["after"]["eos_probability"] < 0.01
        begun, _, _ = console.getvalue().partition("held-out at 0")
        for said in (begun, page):  # before the first step, and on the page
            assert "no document of lists ends with" in said.replace("&lt;", "<")


def test_evaluate_says_it_too_with_the_exported_folder(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    first = train(
        load_run_config(mapping=run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory)), stream=io.StringIO()
    )
    mapping = run_mapping(
        tmp_path,
        corpus_directory,
        tiny_tokenizer_directory,
        run={"name": "more"},
        model={"pretrained": str(first.run_directory)},
        train={"steps": 2},
    )
    run = train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory
    folder = run / "export" / "hf"
    shutil.copytree(next(run.glob("checkpoints/*step_2/model/consolidated")), folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 5}))
    evaluation = steep.evaluate(run, against="base", precision="fp32")
    audit = evaluation.to_mapping()["end_of_text"]
    summary = json.loads((run / "summary.json").read_text())["end_of_text"]
    assert audit["sources"] == summary["sources"]
    for side in ("before", "after"):
        assert audit[side]["eos_probability"] == pytest.approx(summary[side]["eos_probability"], rel=1e-3)
    assert audit["ids"]["export/hf/generation_config.json"] == [5]
    assert "export/hf/generation_config.json names 5 as end of text" in evaluation.to_text()
