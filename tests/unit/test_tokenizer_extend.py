"""New tokens: continued merges against BPE done by hand and by the tokenizers library, fertility, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import steep
from steep.cli.main import app
from steep.core.errors import ConfigError, DataError, ModelError
from steep.tokenizer.bpe import continue_merges, count_words, merge, split_pieces, unreachable, with_merges
from steep.tokenizer.config import VocabularyConfig
from steep.tokenizer.fertility import fertility
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.vocabulary import extend_tokenizer, new_tokens


def letters(*merges: tuple[str, str]) -> Tokenizer:
    """A BPE tokenizer of the letters a to e with some merges."""
    tokens = [*"abcde", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_merges_go_on_from_the_tokenizers_own() -> None:
    words = Counter({"abcd": 5, "abce": 3, "dede": 4})
    learned = continue_merges(letters(("a", "b")), words, 3)
    # ab+c 8 times; then d+e 8 times; then abc+d 5 times
    assert learned.pairs == [("ab", "c"), ("d", "e"), ("abc", "d")]
    assert learned.counts == [8, 8, 5]


def test_a_pair_is_merged_from_the_left() -> None:
    assert merge(list("aaab"), ("a", "a")) == ["aa", "a", "b"]
    assert merge(list("ab"), ("b", "a")) == ["a", "b"]


def test_rare_pairs_and_tokens_that_exist_are_left_alone() -> None:
    assert continue_merges(letters(), Counter({"ab": 1}), 5).pairs == []
    there = Tokenizer(models.BPE({**{t: i for i, t in enumerate("abcde")}, "ab": 5}, []))
    assert continue_merges(there, Counter({"ab": 9}), 5).pairs == []


def test_from_nothing_it_is_the_library_s_own_training(documents: list[str]) -> None:
    """Continued from an alphabet alone, the merges are those that tokenizers' trainer learns."""
    words = Counter(word for text in documents[:20] for word in text.split() if word.isascii() and word.isalpha())
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted({letter for word in words for letter in word})
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 150, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator((word for word, n in words.items() for _ in range(n)), trainer)
    theirs = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    base = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    ours = continue_merges(base, words, 150)
    assert len(set(ours.pairs) & set(theirs)) >= 145  # pairs met equally often may come in another order
    assert ours.counts == sorted(ours.counts, reverse=True)


def test_the_extended_tokenizer_keeps_old_ids_and_reaches_every_new_one(
    tiny_tokenizer_directory: Path, documents: list[str]
) -> None:
    base: Any = load_hf_tokenizer(str(tiny_tokenizer_directory))
    backend = base.backend_tokenizer
    learned = continue_merges(backend, count_words(backend, documents[:20]), 50)
    more = Tokenizer.from_str(with_merges(backend.to_str(), learned))
    assert all(more.token_to_id(token) == number for token, number in backend.get_vocab().items())
    assert unreachable(more, learned.tokens) == []
    for text in documents[:20]:
        assert more.decode(more.encode(text).ids) == text
        assert len(more.encode(text).ids) < len(backend.encode(text).ids)
    assert unreachable(backend, ["never"]) == ["never"]


def test_special_tokens_after_the_vocabulary_keep_their_ids(documents: list[str], tmp_path: Path) -> None:
    """The layout of Qwen and Llama 3: special tokens are no part of the model's vocabulary and come after it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    trained.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>").save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n".join(documents[:20]))
    steep.tokenizer_extend(
        str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "base"), tokens=30, out=tmp_path / "more"
    )
    base, extended = load_hf_tokenizer(str(tmp_path / "base")), load_hf_tokenizer(str(tmp_path / "more"))
    ids = extended.get_vocab()
    assert all(ids[token] == number for token, number in base.get_vocab().items())
    assert sorted(ids.values()) == list(range(432))
    assert extended("a<|im_end|>")["input_ids"][-1] == base("<|im_end|>")["input_ids"][0] == 401
    found = extend_tokenizer(base, VocabularyConfig(add=str(tmp_path / "more")))
    assert found is not None
    assert (sorted(found.subtokens), found.rows) == (list(range(402, 432)), 432)


def test_the_command_writes_a_folder_that_a_run_takes(
    tiny_tokenizer_directory: Path, corpus_directory: Path, tmp_path: Path
) -> None:
    out = tmp_path / "extended"
    arguments = ["tokenizer", "extend", str(corpus_directory), "--tokenizer", str(tiny_tokenizer_directory)]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "64", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "64 new tokens" in result.output
    assert "unreachable: none" in result.output
    base, extended = load_hf_tokenizer(str(tiny_tokenizer_directory)), load_hf_tokenizer(str(out))
    assert len(extended) == len(base) + 64
    assert extended.eos_token == base.eos_token
    found = extend_tokenizer(base, VocabularyConfig(add=str(out)))
    assert found is not None
    assert (len(found.subtokens), found.rows) == (64, len(extended))
    assert all(len(parts) >= 2 and max(parts) < len(base) for parts in found.subtokens.values())
    with pytest.raises(ConfigError, match="exists already"):
        steep.tokenizer_extend(str(corpus_directory), tokenizer=str(tiny_tokenizer_directory), out=out)


def test_fertility_counts_and_advises(tiny_tokenizer_directory: Path, corpus_directory: Path, tmp_path: Path) -> None:
    report = steep.tokenizer_fertility(str(corpus_directory), tokenizer=str(tiny_tokenizer_directory))
    assert report.saved_ratio is not None
    assert report.saved_ratio > 0.1
    assert report.advice.startswith("extend: 1,000 more tokens save")
    (tmp_path / "words.txt").write_text("alpha beta " * 50)
    result = CliRunner().invoke(
        app, ["tokenizer", "fertility", str(tmp_path), "--tokenizer", str(tiny_tokenizer_directory), "--json"]
    )
    assert json.loads(result.output)["texts"][0]["words"] == 100


def test_known_corpora_give_known_values() -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=letters(("a", "b")))
    found = fertility(wrapped, ["ab cd ab", "abe"], "text")
    assert (found.text_bytes, found.words, found.tokens) == (11, 4, 6)
    assert found.tokens_per_word == 1.5
    assert found.whole_words_ratio == 0.5
    assert found.costliest == [("abe", 1, 2), ("cd", 1, 2)]
    with pytest.raises(DataError, match="no word"):
        fertility(wrapped, ["  "], "text")


def test_pieces_are_all_of_the_text() -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))
    chosen, held_out = split_pieces([text])
    assert sum(map(len, chosen)) + sum(map(len, held_out)) == len(text)
    assert 0.05 < sum(map(len, held_out)) / len(text) < 0.15


@pytest.mark.parametrize(
    ("add", "problem"),
    [
        ([], "holds no token"),
        (["a", " "], "empty token"),
        (["one", "one"], "named more than once"),
        ("nowhere.txt", "neither a file nor a folder"),
    ],
)
def test_lists_that_name_nothing_are_refused(add: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        new_tokens(add)


def test_tokens_that_are_there_and_other_tokenizers_are_refused(tiny_tokenizer_directory: Path, tmp_path: Path) -> None:
    base = load_hf_tokenizer(str(tiny_tokenizer_directory))
    with pytest.raises(ConfigError, match="one token already"):
        extend_tokenizer(base, VocabularyConfig(add=["a"]))
    PreTrainedTokenizerFast(tokenizer_object=letters(("a", "b"))).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="does not extend the model's tokenizer"):
        extend_tokenizer(base, VocabularyConfig(add=str(tmp_path / "other")))
    (tmp_path / "tokens.txt").write_text("frobnicator\n\nquux\n")
    with pytest.raises(ConfigError, match="a blank line"):
        new_tokens(str(tmp_path / "tokens.txt"))
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("a b a b")
    with pytest.raises(ModelError, match="is a WordLevel tokenizer"):
        steep.tokenizer_extend(str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "words"), out=tmp_path / "out")
    unsplit = letters(("a", "b"))
    unsplit.pre_tokenizer = None
    PreTrainedTokenizerFast(tokenizer_object=unsplit).save_pretrained(tmp_path / "unsplit")
    with pytest.raises(ModelError, match="does not cut text into words"):
        steep.tokenizer_extend(str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "unsplit"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
