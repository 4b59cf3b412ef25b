"""lingua's folders and TinyStories-style files as they lie on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steep.config.run import RunConfig
from steep.core.say import say_nothing
from steep.data.open import open_run_data
from steep.sources.config import SourceConfig
from steep.sources.hints import say_hints
from steep.sources.inputs import expand_inputs, load_format
from steep.sources.lingua import validation_paths
from steep.store.cache import open_sources
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


def write_jsonl(path: Path, texts: list[str], key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sources as lingua's script makes them: more chunks than any number of ranks, and one with another key."""
    for number in range(5):
        write_jsonl(
            tmp_path / "lin" / "a" / f"a.chunk.{number:02d}.jsonl",
            [f"a chunk {number} line {i}" for i in range(3)],
            "text",
        )
    write_jsonl(tmp_path / "lin" / "a" / "a.val.jsonl", ["a held out"], "text")
    write_jsonl(tmp_path / "lin" / "b" / "b.chunk.00.jsonl", ["b one", "b two"], "content")
    write_jsonl(tmp_path / "lin" / "b" / "b.val.jsonl", ["b held out"], "content")
    return tmp_path / "lin"


def texts_of(source: SourceConfig, tokenizer: TextTokenizer, cache: Path) -> list[str]:
    (store,) = open_sources([source], tokenizer, cache_directory=cache)
    return [tokenizer.decode_text(store.document(number)) for number in range(store.num_documents)]


def hints(source: SourceConfig) -> list[str]:
    said: list[str] = []
    say_hints(source, said.append)
    return said


def test_a_source_folder_is_all_its_chunks_in_order(root: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    expected = [f"a chunk {number} line {i}" for number in range(5) for i in range(3)]
    assert texts_of(SourceConfig(path=str(root / "a")), tokenizer, tmp_path / "c") == expected
    assert texts_of(SourceConfig(path=str(root)), tokenizer, tmp_path / "c") == [*expected, "b one", "b two"]
    assert texts_of(SourceConfig(path=str(root / "*")), tokenizer, tmp_path / "c") == [*expected, "b one", "b two"]


def test_the_held_out_files_are_named(root: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    said: list[str] = []
    open_sources([SourceConfig(path=str(root))], tokenizer, cache_directory=tmp_path / "c", say=said.append)
    (message,) = said
    assert message.startswith(f"{root}/a/a.val.jsonl and 1 more: held out as in lingua")
    assert hints(SourceConfig(path=str(root / "a" / "a.chunk.00.jsonl"))) == []


def test_under_validation_the_same_folder_means_its_held_out_files(
    root: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    assert validation_paths([str(root)]) == [str(root / "a" / "a.val.jsonl"), str(root / "b" / "b.val.jsonl")]
    assert validation_paths([str(root / "b"), "hub:x"]) == [str(root / "b" / "b.val.jsonl"), "hub:x"]
    data_section = {
        "sequence_length": 8,
        "train": [{"path": str(root / "a"), "weight": 0.7}, {"path": str(root / "b"), "weight": 0.3}],
        "validation": {"a": {"path": str(root / "a")}, "b": {"path": str(root / "b" / "b.val.jsonl")}},
        "cache_directory": str(tmp_path / "cache"),
    }
    data = open_run_data(
        RunConfig.model_validate({"model": {"pretrained": "any"}, "data": data_section}), tokenizer, say_nothing
    )
    assert [store.num_documents for store in data.stores] == [15, 2]
    held_out = [tokenizer.decode_text(store.document(0)) for store in data.held_out_stores]
    assert held_out == ["a held out", "b held out"]


def test_held_out_files_are_only_those_beside_chunks(root: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "other" / "x.val.jsonl", ["trained on, as named"], "text")
    write_jsonl(tmp_path / "other" / "x.jsonl", ["x"], "text")
    names = [file.path.name for file in expand_inputs(SourceConfig(path=str(tmp_path / "other")))]
    assert names == ["x.jsonl", "x.val.jsonl"]
    (named,) = expand_inputs(SourceConfig(path=str(root / "a" / "a.val.jsonl")))
    assert named.path.name == "a.val.jsonl"


STORIES = ["Once upon a time.\nThe end.", "Tom had a ball.", "A third story."]


def test_stories_with_separators_are_documents_when_the_separator_is_named(tmp_path: Path) -> None:
    path = tmp_path / "TinyStories-valid.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n")
    source = SourceConfig(path=str(path), document_separator="\n<|endoftext|>\n")
    records = load_format("plain_text").read(path, source)
    assert [record.text for record in records] == STORIES
    assert hints(source) == []


@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|end_of_text|>"])
def test_stories_without_a_separator_give_a_hint(tmp_path: Path, mark: str, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{mark}\n".join(STORIES))
    said: list[str] = []
    open_sources([SourceConfig(path=str(path))], tokenizer, cache_directory=tmp_path / "c", say=said.append)
    (message,) = said
    assert f"{mark!r} 2 times" in message
    assert f"document_separator: {mark!r}" in message
    (tmp_path / "plain.txt").write_text("no marks")
    assert hints(SourceConfig(path=str(tmp_path / "plain.txt"))) == []


def test_prepare_prints_what_it_leaves_out_and_what_seems_to_be_missing(
    root: Path, tiny_tokenizer_directory: Path, tmp_path: Path
) -> None:
    import steep

    (root / "a" / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    result = steep.prepare(str(root / "a"), tokenizer=str(tiny_tokenizer_directory), out=tmp_path / "out", workers=1)
    assert "a.val.jsonl: held out as in lingua" in str(result)
    assert "document_separator: '<|endoftext|>'" in str(result)
    assert result.documents == 16
