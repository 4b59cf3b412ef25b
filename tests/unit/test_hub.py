"""The hub of Hugging Face where it does not answer: one short question, then what works instead. Real sockets, no network."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

import steep
from steep.core import hub
from steep.core.errors import DataError, ModelError
from steep.models.hf_config import pretrained_config
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from support import run_mapping

COMMIT = "0123456789" * 4
NAME = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """huggingface_hub as it is without HF_HUB_OFFLINE, with a cache of two models, one of them without a tokenizer."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, file in (("someone/tiny", "config.json"), ("someone/tiny", "tokenizer.json"), ("gpt2", "config.json")):
        model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        folder = model / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(COMMIT)
        (folder / file).write_text("{}")
    hub._silence_of.cache_clear()
    return tmp_path / "hub"


@pytest.fixture
def refusing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, and a hub at a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
    return cache


@contextmanager
def server(status: int) -> Iterator[str]:
    """A hub that gives this answer to everything."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize(("status", "silent"), [(200, False), (404, False), (503, True)])
def test_any_answer_but_that_of_a_broken_server_is_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch, status: int, silent: bool
) -> None:
    with server(status) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert bool(hub.hub_silence()) is silent


def test_a_hub_that_accepts_and_says_nothing_is_given_up_on_in_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.PROBE_SECONDS <= 5
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        started = time.monotonic()
        assert "does not answer" in hub.hub_silence()
        assert hub.hub_silence()  # not asked again
        assert time.monotonic() - started < 3


def test_a_model_that_is_nowhere_is_answered_with_what_works(refusing: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError) as caught:
        pretrained_config(NAME)
    for part in (".gguf", "a local folder", "gpt2, someone/tiny", f"hf download {NAME}", "does not answer"):
        assert part in str(caught.value)
    with pytest.raises(ModelError) as caught:
        load_hf_tokenizer(NAME)
    assert "someone/tiny" in str(caught.value)
    assert "gpt2" not in str(caught.value)  # its tokenizer is not in the cache
    assert "Retrying" not in capfd.readouterr().err


def test_what_is_in_the_cache_is_read_from_there_and_said(refusing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub._tell_once.cache_clear()
    with pytest.raises(ModelError, match="has no model_type"):  # the file in the cache is {}
        pretrained_config("someone/tiny")
    assert "someone/tiny is read from the cache" in capsys.readouterr().err
    with pytest.raises(ModelError, match="the cache does not hold all that is needed"):
        pretrained_config("someone/tiny", revision="v2")


def test_a_dataset_is_answered_likewise(refusing: Path, tmp_path: Path) -> None:
    formats = pytest.importorskip("steep.sources.formats.hub")
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="hf download someone/text --repo-type dataset"):
        formats.identity(Path("hub:someone/text:en"))


def test_tasks_of_lm_eval_are_answered_likewise(refusing: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE=1 to read it from the cache"):
        steep.evaluate_tasks("some/model", "arc_easy")


def test_a_run_that_cannot_begin_leaves_no_folder(
    refusing: Path, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": NAME})
    with pytest.raises(ModelError, match="does not answer"):
        steep.train(mapping)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "small").mkdir(parents=True)  # the user's own stays
    with pytest.raises(ModelError, match="does not answer"):
        steep.train(mapping)
    assert (tmp_path / "runs" / "small").is_dir()
