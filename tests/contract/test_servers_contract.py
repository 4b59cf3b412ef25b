"""Every server of `steep chat --serve`: it says why it cannot serve a model, and listens on loopback only."""

from __future__ import annotations

import importlib.util
import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import steep
from steep.core.errors import ConfigError, SteepError
from steep.core.plugins import load_plugin, plugin_names
from steep.serving.served_model import ServedModel, served_model
from steep.serving.server import FUNCTIONS, PREFERRED, SERVERS, check_port, choose_server, running_server

NAMES = plugin_names(SERVERS)


def ask(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path) -> Path:
    """A tiny Llama as a folder, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from support import LLAMA

    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("served") / "model"
    config = AutoConfig.for_model(**LLAMA, eos_token_id=0, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(made)
    return made


def test_every_server_is_listed_in_the_order_of_choice() -> None:
    assert sorted(PREFERRED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_server_listens_on_loopback_and_the_port_only(name: str, tmp_path: Path) -> None:
    plugin = load_plugin(SERVERS, name, FUNCTIONS)
    model = ServedModel(str(tmp_path), tmp_path / "m.gguf" if name == "llama_cpp" else None)
    words = plugin.command(model, 8123)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "8123"


@pytest.mark.parametrize("name", NAMES)
def test_a_server_says_what_it_does_not_serve(name: str, tmp_path: Path) -> None:
    other = ServedModel(str(tmp_path), None if name == "llama_cpp" else tmp_path / "m.gguf")
    assert "gguf" in load_plugin(SERVERS, name, FUNCTIONS).why_not(other)
    with pytest.raises(ConfigError, match=rf"--server {name}: it serves"):
        choose_server(other, name)


def test_an_unknown_server_and_a_model_that_none_serves_name_what_there_is(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="There are: llama_cpp, transformers, vllm"):
        choose_server(ServedModel(str(tmp_path)), "transformer")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("STEEP_LLAMA_CPP_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(
        ConfigError, match="no server that is installed here(.|\n)*llama_cpp: neither(.|\n)*pip install"
    ):
        choose_server(ServedModel(str(tmp_path / "m.gguf"), tmp_path / "m.gguf"))


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="another program listens on it; give another port"):
            check_port(taken.getsockname()[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs the extra serve")
def test_transformers_serves_what_steep_generates(folder: Path) -> None:
    model = served_model(folder, print)
    assert choose_server(model, "transformers") == "transformers"
    expected = steep.generate(folder, "The with statement", max_new_tokens=8, precision="fp32")
    with running_server(model, "transformers", free_port()) as server:
        answer = ask(
            f"{server.url}/completions", model=str(folder), prompt="The with statement", max_tokens=8, temperature=0
        )
    assert answer["choices"][0]["text"] == expected
    assert server.process.poll() is not None  # it ended with the block


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs the extra serve")
def test_a_server_that_ends_says_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(SteepError, match=r"transformers ended with code \d+"),
        running_server(ServedModel(str(tmp_path)), "transformers", free_port()),
    ):
        raise AssertionError("it answered")
