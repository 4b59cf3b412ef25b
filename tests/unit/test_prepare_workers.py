"""The bytes of a token store depend on neither the tokenizer backend nor the number of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steep.core.errors import ConfigError
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig
from steep.store.prepare import prepare_sources
from steep.store.reader import open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_tokenizer

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> list[SourceConfig]:
    """Two sources: 3 MB of JSONL with records that are no documents between them, and a folder of text files."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for number in range(8):
        lines += [json.dumps({"text": f"{number} {text} <|endoftext|> é e\u0301 🚀\r\n"}) for text in documents]
        lines += ["not JSON", '{"text": null}', '{"text": ""}', '{"text": "\\u0000"}', '{"other": 1}']
    (folder / "many.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "files").mkdir()
    for number, text in enumerate(documents):
        (folder / "files" / f"{number}.txt").write_text(text, encoding="utf-8")
    return [SourceConfig(path=str(folder / "many.jsonl")), SourceConfig(path=str(folder / "files"))]


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store; of the manifest all but which backends were used, and so its own checksum."""
    found = {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    manifest = json.loads(found["manifest.json"])
    del manifest["tokenizer"]["backends"], manifest["checksum"]
    return {**found, "manifest.json": json.dumps(manifest).encode()}


def config(backend: str, workers: int) -> PrepareConfig:
    return PrepareConfig(workers=workers, tokenizer_backend=backend)


@pytest.fixture(scope="module")
def expected(
    corpus: list[SourceConfig], tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the reference backend writes with one worker."""
    out = tmp_path_factory.mktemp("expected") / "store"
    prepare_sources(corpus, tokenizer, out, config("huggingface", 1))
    return contents(out)


@pytest.mark.parametrize(("backend", "workers"), [("huggingface", 2), ("gigatoken", 1), ("gigatoken", 2)])
def test_the_bytes_are_the_same_for_every_backend_and_any_workers(
    corpus: list[SourceConfig],
    tokenizer: TextTokenizer,
    expected: dict[str, bytes],
    tmp_path: Path,
    backend: str,
    workers: int,
) -> None:
    out = tmp_path / "store"
    result = prepare_sources(corpus, tokenizer, out, config(backend, workers))
    assert contents(out) == expected
    assert result.ledger["dropped"] == {"empty": 8, "no text field": 8, "not JSON": 8, "wrong type": 8}
    backends = json.loads((out / "manifest.json").read_text())["tokenizer"]["backends"]
    assert len(backends) == 2
    assert all(name.startswith(backend) for name in backends)


def test_the_ids_are_those_of_the_reference_document_by_document(
    corpus: list[SourceConfig], tokenizer: TextTokenizer, documents: list[str], tmp_path: Path
) -> None:
    prepare_sources(corpus[1:], tokenizer, tmp_path / "store", config("gigatoken", 2))
    store = open_store(tmp_path / "store")
    in_order = [text for _, text in sorted((f"{number}.txt", text) for number, text in enumerate(documents))]
    assert [store.document(number).tolist() for number in range(store.num_documents)] == [
        [*tokenizer.encode(text), tokenizer.eos_id] for text in in_order
    ]


def test_the_backend_is_no_part_of_what_a_store_was_made_from(
    corpus: list[SourceConfig], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    first = prepare_sources(corpus[1:], tokenizer, tmp_path / "store", config("gigatoken", 1))
    again = prepare_sources(corpus[1:], tokenizer, tmp_path / "store", config("huggingface", 1))
    assert (first.already_there, again.already_there) == (False, True)


def test_a_small_corpus_is_left_to_the_reference(
    corpus: list[SourceConfig], tokenizer: TextTokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare_sources(corpus[1:], tokenizer, tmp_path / "store", config("auto", 1))
    (backend,) = json.loads((tmp_path / "store" / "manifest.json").read_text())["tokenizer"]["backends"]
    assert backend.startswith("huggingface (tokenizers ")
    assert "huggingface" not in capfd.readouterr().err


def test_an_unknown_backend_is_an_error_that_names_the_others(
    corpus: list[SourceConfig], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="There are: gigatoken, huggingface"):
        prepare_sources(corpus[1:], tokenizer, tmp_path / "store", config("fastest", 1))


def test_killed_in_the_middle_it_continues_with_the_other_backend_to_the_same_bytes(
    corpus: list[SourceConfig], tiny_tokenizer_directory: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    paths = [str(source.path) for source in corpus]
    tokenizer = load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))
    code = (
        "import sys; from pathlib import Path\n"
        "from steep.sources.config import SourceConfig; from steep.store.config import PrepareConfig\n"
        "from steep.store.prepare import prepare_sources; from steep.tokenizer.encode import TextTokenizer\n"
        "prepare_sources([SourceConfig(path=path) for path in sys.argv[3:]], TextTokenizer.load(Path(sys.argv[1])),\n"
        "        Path(sys.argv[2]), PrepareConfig(workers=2, tokenizer_backend='huggingface'))"
    )
    tokenizer.save(tmp_path / "tokenizer")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "tokenizer"), str(out), *paths])
    deadline = time.monotonic() + 60
    while not list((out / ".prepare").glob("shard_*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    result = prepare_sources(corpus, tokenizer, out, config("gigatoken", 2))
    assert result.shards_continued >= 1
    found = contents(out)
    assert {name: found[name] for name in expected if name.endswith((".bin", ".idx", ".npy"))} == {
        name: raw for name, raw in expected.items() if name.endswith((".bin", ".idx", ".npy"))
    }
    assert json.loads(found["manifest.json"])["fingerprint"] == json.loads(expected["manifest.json"])["fingerprint"]
