"""What a notebook shows of results: tables and figures that need nothing else, and the history of a run as plain values."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import steep
from steep.evaluation.evaluate_model import Evaluation
from steep.evaluation.held_out import Score
from support import run_mapping, train_lines


def test_a_run_is_shown_with_its_texts_and_its_loss(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"steps": 3})
    plan = steep.plan(mapping)._repr_html_()
    assert "3 steps of 4 x 64 tokens" in plan
    assert len(re.findall(r"width: [\d.]+%", plan)) == 7  # a bar for each part of the memory

    result = steep.train(mapping)
    lines = train_lines(result.run_directory)
    assert [{"kind": "train", **step} for step in result.history] == lines
    assert result.history[2]["loss"] < result.history[0]["loss"]
    assert [(score["step"], score["text"]) for score in result.scores] == [(0, "heldout"), (3, "heldout")]

    page = result._repr_html_()
    assert f"{result.after['heldout']['bits_per_byte']:.4f}" in page
    found = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert found is not None
    assert base64.b64decode(found[1]).startswith(b"\x89PNG")
    assert "http" not in page


def test_what_comes_from_a_run_is_escaped() -> None:
    score = Score("<script>", 2.0, 7.4, 1.1, 100, 2, 400)
    page = Evaluation("runs/<b>", [score], "<i>", [score])._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
