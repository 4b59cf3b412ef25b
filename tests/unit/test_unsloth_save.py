"""A notebook's `save_model` writes files and shows no bar of transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from steep.models.config import ModelConfig
from steep.models.load import load_model
from steep.unsloth.trainer import UnslothTrainer
from support import LLAMA


def test_saving_shows_no_bar(tmp_path: Path, tiny_tokenizer_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model: Any = load_model(ModelConfig(config=LLAMA))
    trainer: Any = SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_tokenizer_directory))
    model.save_pretrained(tmp_path / "plain")
    assert "Writing model shards" in capfd.readouterr().err  # what transformers shows by itself
    UnslothTrainer.save_model(trainer, str(tmp_path / "saved"))
    assert capfd.readouterr().err == ""
    assert (tmp_path / "saved" / "model.safetensors").is_file()
