"""Optional packages: a run that does not use one does not import it, and their import says nothing that is no news."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steep.cli.packages import _of_model, _of_run
from steep.config.load import load_run_config
from steep.runtime.optional_packages import NOISE, OPTIONAL_PACKAGES, leave_out_packages, quiet_imports
from support import run_mapping, write_yaml

LEAST: dict[str, Any] = {"model": {"pretrained": "some/model"}, "data": {"train": [{"path": __file__}]}}
PROGRAM = """
import sys
from steep.cli.main import run
code = run(sys.argv[1:])
print(*(name for name in ("torchao", "bitsandbytes", "lm_eval") if sys.modules.get(name) is not None), sep=" ")
sys.exit(code)
"""


def used(**sections: Any) -> set[str]:
    return set(_of_run(load_run_config(mapping={**LEAST, **sections}))) - {""}


def test_what_a_run_uses_is_read_from_its_configuration() -> None:
    assert used() == set()
    assert used(optimizer={"name": "adamw_8bit"}) == {"bitsandbytes"}
    assert used(optimizer={"name": "adamw_8bit_torchao"}) == {"torchao"}
    for method, package in (("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), ("torchao_int8", "torchao")):
        assert used(model={"pretrained": "some/model", "quantize": method}, adapter={"rank": 4}) == {package}
    assert used(optimizer={"_target_": "torch.optim.SGD", "lr": 0.1}) == set(
        OPTIONAL_PACKAGES
    )  # it may import anything


def test_what_a_model_uses_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    assert set(_of_model(str(tmp_path))) == {"torchao"}
    assert not set(_of_model(str(tmp_path / "missing")))
    assert not set(_of_model("some/model"))


def test_a_process_that_has_torch_is_left_alone() -> None:
    import torch  # noqa: F401

    before = dict(sys.modules)
    leave_out_packages(())
    assert {name: sys.modules.get(name) for name in OPTIONAL_PACKAGES} == {
        name: before.get(name) for name in OPTIONAL_PACKAGES
    }


def test_only_the_known_lines_are_kept_away(caplog: pytest.LogCaptureFixture) -> None:
    with quiet_imports():
        for name, text in NOISE.items():
            logging.getLogger(name).warning("%s this", text)
            logging.getLogger(name).warning("news of %s", name)
    logging.getLogger("torchao").warning("Failed to load that")
    assert caplog.messages == [*(f"news of {name}" for name in NOISE), "Failed to load that"]


def test_a_run_with_an_adapter_imports_none_and_writes_no_error_line(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    """From a folder of weights, since that is where transformers and peft would import them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from support import LLAMA

    LlamaForCausalLM(LlamaConfig(**{key: size for key, size in LLAMA.items() if key != "model_type"})).save_pretrained(
        tmp_path / "base"
    )
    mapping = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(tmp_path / "base")},
        adapter={"rank": 2}, train={"steps": 1}, evaluate={"tokens": 200},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train", str(write_yaml(mapping, tmp_path / "run.yaml"))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert [line for line in done.stderr.splitlines() if not line.startswith("preparing text: ")] == []


WHO_IMPORTS = """
import sys
import transformers.modeling_utils
print("torchao" in sys.modules, "bitsandbytes" in sys.modules)
import peft
print("bitsandbytes" in sys.modules)
"""


def test_who_imports_them_where_steep_may_not_leave_them_out() -> None:
    """What the docstring of `optional_packages` says of a run from Python; once this fails, it can be said better."""
    pytest.importorskip("torchao", reason="the extra quant is not installed")
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    done = subprocess.run([sys.executable, "-c", WHO_IMPORTS], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr


FINGERPRINTS = """
import sys
from steep.cli.packages import prepare_text_imports
prepare_text_imports(sys.argv[1], ["text.txt"])
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import load_tokenizer
for folder in sys.argv[1:]:
    print(load_tokenizer(TokenizerConfig(pretrained=folder)).fingerprint)
assert sys.modules["torch"] is None
"""


def test_tokenizers_are_the_same_without_torch(tmp_path: Path, tiny_tokenizer_directory: Path) -> None:
    """The classes that transformers builds from tokenizer.json, from rules of its own, and those that it corrects."""
    from steep.tokenizer.config import TokenizerConfig
    from steep.tokenizer.open import load_tokenizer

    folders, settings = [], json.loads((tiny_tokenizer_directory / "tokenizer_config.json").read_text())
    for family, kind in (
        ("gpt2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("llama", "LlamaTokenizer"), ("gemma", "GemmaTokenizer"),
        ("llama", "PreTrainedTokenizerFast"), ("qwen2", "GPT2Tokenizer"),
    ):  # fmt: skip
        folder = tmp_path / f"{family}_{kind}"
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes((tiny_tokenizer_directory / "tokenizer.json").read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", FINGERPRINTS, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "PyTorch was not found" not in done.stderr
    found = [load_tokenizer(TokenizerConfig(pretrained=folder)).fingerprint for folder in folders]
    assert done.stdout.split() == found
    assert len(set(found)) > 2  # these classes do differ


def test_a_path_is_checked_before_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    import steep
    from steep.core.errors import DataError, ModelError

    (tmp_path / "corpus.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"did you mean '.*corpus\.jsonl'\?"):
        steep.prepare(tmp_path / "corpos.jsonl", tokenizer="nobody/nothing", out=tmp_path / "out")
    with pytest.raises(ModelError, match="--tokenizer .* does not exist"):
        steep.prepare(tmp_path / "corpus.jsonl", tokenizer=str(tmp_path / "tok"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_streamed_dataset_and_a_gguf_keep_torch(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    program = "import sys; from steep.cli.packages import prepare_text_imports as p; p(*sys.argv[1:2], sys.argv[2:])\n"
    for tokenizer, text in (
        ("some/model", "hub:some/text"),
        (str(tmp_path), "a.txt"),
        (str(tmp_path / "model.gguf"), "a.txt"),
    ):
        subprocess.run(
            [sys.executable, "-c", f"{program}assert 'torch' not in sys.modules", tokenizer, text], check=True
        )
