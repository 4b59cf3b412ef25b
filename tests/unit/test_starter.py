"""`steep init` and `steep config`: what they write is read back, and a plan accepts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import steep
from steep.config.load import load_run_config
from steep.config.yaml_file import parse_yaml
from steep.core.errors import ConfigError, DataError, ModelError
from steep.models.families import FAMILIES, parameters_of
from support import LLAMA

IDS = [
    "smollm2", "HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM3-3B-Base", "meta-llama/Llama-3.1-8B",
    "meta-llama/Meta-Llama-3-70B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-30B-A3B-Base", "google/gemma-2-9b", "google/gemma-3-1b-pt",
    "mistralai/Mistral-Nemo-Base-2407", "microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-4", "gpt2",
    "openai-community/gpt2-xl", "allenai/OLMo-2-1124-13B", "qwen3",
]  # fmt: skip


def test_sizes_are_read_from_names() -> None:
    expected = {
        "HuggingFaceTB/SmolLM2-135M": 135e6, "meta-llama/Llama-3.2-1B": 1e9, "Qwen/Qwen2.5-0.5B-Instruct": 0.5e9,
        "Qwen/Qwen3-30B-A3B": 30e9, "microsoft/Phi-3-mini-4k-instruct": 3.8e9, "microsoft/phi-4": 14.7e9, "gpt2": 124e6,
        "openai-community/gpt2-medium": 355e6, "models/mine": None, "smol/SmolLM2-135M.Q4_1.gguf": 135e6,
    }  # fmt: skip
    assert {name: parameters_of(name) for name in expected} == expected


@pytest.mark.parametrize("model", [*IDS, *(family.example for family in FAMILIES)])
def test_ready_settings_are_a_complete_run_file(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    Path("corpus/a.jsonl").write_text('{"text": "x"}\n')
    config = load_run_config(mapping=parse_yaml(steep.ready_config(model)).data)
    assert config.recipe == "continued_pretraining"
    large = (parameters_of(config.model.pretrained or "") or 0) > 2.5e9  # type: ignore[union-attr]
    assert (config.adapter is not None) is large
    rate = config.optimizer.learning_rate  # type: ignore[union-attr]
    assert rate >= 1e-4 if large else rate <= 5e-5
    assert not {"gpt2", "gpt2-xl"} & {model.rpartition("/")[2]} or config.data.sequence_length == 1024


def test_an_unknown_model_is_answered_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no ready settings for 'some/bert'.*smollm2.*olmo.*steep init TEXT"):
        steep.ready_config("some/bert")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    sizes = {key: size for key, size in LLAMA.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folder)
    return folder


def test_what_init_writes_is_planned_at_once(model: Path, tmp_path: Path, documents: list[str]) -> None:
    text = tmp_path / "pages.jsonl"
    text.write_text("".join(json.dumps({"body": page, "id": "page"}) + "\n" for page in documents[:40]))
    result = steep.init(text, str(model), out=tmp_path / "run.yaml")
    written = result.path.read_text()
    assert written.startswith("# yaml-language-server: $schema=./steep.schema.json\n")
    assert json.loads(result.schema.read_text())["title"] == "steep run"
    config = load_run_config(result.path, ["--data.cache_directory", str(tmp_path / "cache")])
    assert config.data.sequence_length == LLAMA["max_position_embeddings"]  # no longer than the model can read
    assert config.data.train[0].text_key == "body"
    plan = steep.plan(config)
    assert plan.sizes.steps >= 20  # little text: smaller steps
    with pytest.raises(ConfigError, match="already exists"):
        steep.init(text, str(model), out=result.path)
    assert result.path.read_text() == written


@pytest.mark.parametrize(
    ("texts", "name", "error", "message"),
    [
        ("pages.jsonl", "./tiny-lama", ModelError, "'./tiny-lama' does not exist"),
        ("page.jsonl", "some/model", DataError, "did you mean '.*pages.jsonl'"),
        ("chat.jsonl", "some/model", DataError, "(?i)chat"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    texts: str, name: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "pages.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(error, match=message):
        steep.init(tmp_path / texts, name, out=tmp_path / "run.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "pages.jsonl"]


def test_names_that_yaml_would_misread_are_quoted(tmp_path: Path) -> None:
    text = tmp_path / "a: b, [c] # d.txt"
    text.write_text("Some text.")
    result = steep.init([text, text], "some/model", out=tmp_path / "run.yaml")
    assert load_run_config(result.path).data.train[0].path == [str(text), str(text)]
