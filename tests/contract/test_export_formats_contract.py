"""What every format of export promises, checked on each file of exporters/formats/, also on those that are added later."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import steep
from steep.core.errors import ConfigError
from steep.core.plugins import plugin_names
from steep.exporters.format import PACKAGE, ExportFormat, dtype_name, load_format
from steep.exporters.parity import Bounds
from steep.models.config import ModelConfig
from steep.models.load import load_model
from support import LLAMA

NEEDS = {"gguf": "gguf", "ollama": "gguf", "adapter": "peft"}
"""Packages without which a format refuses its work."""
NAMES = plugin_names(PACKAGE)


def format_of(name: str) -> ExportFormat:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    return load_format(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path) -> Path:
    """A small model's folder with its tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("source")
    model: Any = load_model(ModelConfig(config={**LLAMA, "eos_token_id": 0}), seed=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """An adapter on that model, as peft writes it."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(source), peft.LoraConfig(r=2, init_lora_weights=False)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_members_of_the_protocol(name: str) -> None:
    exporter = format_of(name)
    assert exporter.DEFAULT_DTYPE in exporter.DTYPES
    assert all(isinstance(bounds, Bounds) and bounds.reason for bounds in exporter.DTYPES.values())
    assert exporter.ENDINGS
    for member in ("check_task", "write", "verify"):
        promised = list(inspect.signature(getattr(ExportFormat, member)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(exporter, member)).parameters) == promised
        assert inspect.getdoc(getattr(exporter, member))


@pytest.mark.parametrize("name", NAMES)
def test_short_names_of_dtypes_are_known_and_others_refused(name: str) -> None:
    exporter = format_of(name)
    assert dtype_name(None, exporter, name) == exporter.DEFAULT_DTYPE
    assert dtype_name("f32", exporter, name) == "float32"
    with pytest.raises(ConfigError, match=f"--to {name} --dtype int3: use one of float32"):
        dtype_name("int3", exporter, name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_verified_replaceable_and_complete(
    name: str, source: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    exporter = format_of(name)
    reference = request.getfixturevalue("adapter") if name == "adapter" else source
    before = sorted(reference.iterdir())
    out = tmp_path / "exports" / name
    result = steep.export(reference, to=name, dtype="f32", out=out)
    assert result.path == out
    assert result.parities
    assert result.parities[-1].greedy_tokens_equal == result.parities[-1].greedy_tokens
    files = [path for path in out.rglob("*") if path.is_file()]
    assert result.size_bytes == sum(path.stat().st_size for path in files)
    assert (out / "README.md").is_file()
    assert not [file for file in files if file.suffix not in exporter.ENDINGS and file.name not in exporter.ENDINGS]
    assert sorted(path.name for path in out.parent.iterdir()) == [name]  # nothing half-written is left beside it
    assert sorted(reference.iterdir()) == before
    with pytest.raises(ConfigError, match="already exists"):
        steep.export(reference, to=name, dtype="f32", out=out)
