"""Generation settings that contradict themselves are mended, with a line, and can then be saved; the rest stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steep.core.errors import ModelError
from steep.models.config import ModelConfig
from steep.models.generation_settings import mend_generation_settings
from steep.models.load import load_model
from support import LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model: Any = load_model(ModelConfig(config=LLAMA))
    model.save_pretrained(path)
    return path


def loaded(folder: Path, **settings: Any) -> Any:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, **settings}))
    return load_model(ModelConfig(pretrained=str(folder)))


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        (
            {"temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_p": 0.9, "do_sample": True},
            "do_sample set to true, since temperature and top_p mean sampling",
        ),
        ({"temperature": 0.6, "do_sample": False}, {}, "temperature removed, since do_sample is false"),
        ({"temperature": 0.0, "top_p": 0.5}, {}, "temperature 0 means the likeliest token"),
        (
            {"top_k": 40, "length_penalty": 2.0},
            {"top_k": 40, "do_sample": True},
            "there is one beam; do_sample set to true",
        ),
        ({"early_stopping": True}, {}, "early_stopping removed, since there is one beam"),
        ({"pad_token_id": -1}, {}, "pad_token_id -1 removed"),
    ],
)
def test_a_contradiction_is_mended_and_said(
    folder: Path, tmp_path: Path, given: dict[str, Any], kept: dict[str, Any], said: str
) -> None:
    model = loaded(folder, **given)
    model.generation_config.use_cache = True  # a changed configuration is refused, one as it was loaded is not
    with pytest.raises(ValueError, match="Fix these issues"):
        model.generation_config.save_pretrained(tmp_path)
    lines: list[str] = []
    mend_generation_settings(model, lines.append)
    model.generation_config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    names = ("temperature", "top_p", "top_k", "length_penalty", "early_stopping", "pad_token_id")
    found = {name: written[name] for name in (*names, "do_sample") if name in written}
    assert {**found, "do_sample": found.get("do_sample") or False} == {"do_sample": False, **kept}
    assert written["eos_token_id"] == 7
    [line] = lines
    assert said in line
    mend_generation_settings(model, lines.append)
    assert len(lines) == 1


def test_what_is_consistent_stays_and_what_cannot_be_read_is_named(folder: Path) -> None:
    lines: list[str] = []
    mend_generation_settings(loaded(folder, temperature=0.7, do_sample=True), lines.append)
    assert lines == []
    with pytest.raises(ModelError, match=r"generation_config\.json: `max_new_tokens` must be greater than 0"):
        loaded(folder, max_new_tokens=0)
