"""A pickle is refused before it is opened, by every command that loads a model and by every route of transformers and peft."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import steep
from steep.core.errors import SteepError
from support import run_mapping
from support import steep as run_steep

PICKLES = (".bin", ".pt", ".pth", ".pkl")
_opened: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not isinstance(arguments[0], (str, os.PathLike)):
        return
    path = str(arguments[0])
    if path.endswith(PICKLES) and "shard_" not in path:  # a store's shards are token ids
        _opened.append(path)


sys.addaudithook(_note)  # the only way to see every open; it cannot be removed, and only keeps a list


@contextmanager
def nothing_opened(message: str = "pickle") -> Iterator[None]:
    """The block raises an error of steep about a pickle, and has opened none."""
    _opened.clear()
    with pytest.raises(SteepError, match=message):
        yield
    assert not _opened


class _Runs:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def base(tmp_path: Path, tiny_tokenizer_directory: Path) -> Path:
    """A tiny model and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )  # fmt: skip
    folder = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folder)
    return folder


def _adapter(base: Path, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    torch.save({**load_file(weights), "more": _Runs(folder / "ran")}, folder / "adapter_model.bin")
    weights.unlink()
    return folder


def _as_adapter(base: Path) -> Path:
    return _adapter(base, base.parent / "adapter")


def _as_bin(base: Path) -> Path:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def _named_by_index(base: Path) -> Path:
    tensors = load_file(base / "model.safetensors")
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return base


def _named_by_config(base: Path) -> Path:
    torch.save(load_file(base / "model.safetensors"), base / "adapter_model.bin")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "adapter_model.bin"}), encoding="utf-8"
    )
    return base


ROUTES = (_as_adapter, _as_bin, _named_by_index, _named_by_config)


def _commands(
    model: Path | str, whole: Path, directory: Path, corpus: Path, tokenizer: Path
) -> Iterator[Callable[[], Any]]:
    mapping = run_mapping(directory, corpus, tokenizer, model={"pretrained": str(model)}, train={"steps": 1})
    yield partial(steep.plan, mapping)
    yield partial(steep.train, mapping)
    yield partial(steep.evaluate, str(model), [str(corpus / "000.txt")])
    yield partial(steep.generate, str(model), "The")
    yield partial(steep.export, str(model), to="hf", out=str(directory / "out"))
    text = [str(corpus / "000.txt")]
    yield partial(steep.blend, str(model), text, base=str(whole), tokens=500, out=str(directory / "blend"))


@pytest.mark.parametrize("route", ROUTES)
def test_a_pickle_is_refused_before_it_is_opened(
    route: Callable[[Path], Path], base: Path, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    model = route(base)
    for command in _commands(model, whole, tmp_path, corpus_directory, tiny_tokenizer_directory):
        with nothing_opened():
            command()
    assert not [*tmp_path.rglob("ran")]


def test_chat_refuses_it_too(base: Path, tmp_path: Path) -> None:
    done = run_steep("chat", str(_as_adapter(base)), cwd=tmp_path)
    assert done.returncode != 0
    assert "holds its adapter as a pickle (adapter_model.bin)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.rglob("ran")]


@pytest.mark.parametrize("route", [_as_adapter, _named_by_index])
def test_a_hub_id_in_the_cache_is_read_as_its_folder_would_be(
    route: Callable[[Path], Path], base: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    model = route(base)
    for name in ("config.json", "model.safetensors"):
        if not (model / name).exists():  # whole but for the pickle, as an adapter in a model's repository is
            shutil.copy(whole / name, model / name)
    if route is _named_by_index:
        (model / "model.safetensors").unlink()
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--one" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    done = run_steep(
        "generate", "some/one", "--prompt", "The", cwd=tmp_path, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1"
    )
    assert done.returncode != 0
    assert "pickle" in done.stderr
    assert "Traceback" not in done.stderr


def test_pickles_beside_a_model_are_left_alone(base: Path, tmp_path: Path) -> None:
    names = ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "adapter_model.bin", "vocab.pkl")
    for name in names:
        torch.save(_Runs(tmp_path / "ran"), base / name)
    _opened.clear()
    assert steep.generate(str(base), "The", max_new_tokens=2)
    steep.export(str(base), to="hf", out=str(tmp_path / "out"))
    assert not _opened
    assert not (tmp_path / "ran").exists()
    assert not [name for name in names if (tmp_path / "out" / name).exists()]


def test_a_tokenizer_that_is_a_pickle_is_not_read(base: Path, tmp_path: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    torch.save(_Runs(tmp_path / "ran"), base / "vocab.pkl")
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TransfoXLTokenizer"}), encoding="utf-8")
    _opened.clear()
    with pytest.raises(SteepError, match="tokenizer"):
        steep.generate(str(base), "The")
    assert not _opened
    assert not (tmp_path / "ran").exists()


def test_an_adapter_beside_a_gguf_file_is_not_added_to_it(base: Path, tmp_path: Path) -> None:
    made = Path(steep.export(str(base), to="gguf", out=str(tmp_path / "gguf")).path)
    file = made if made.suffix == ".gguf" else next(made.glob("*.gguf"))
    adapter = _as_adapter(base)
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(adapter / name, file.parent / name)
    with nothing_opened("beside"):
        steep.generate(str(file), "The")
