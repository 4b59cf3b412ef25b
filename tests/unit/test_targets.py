"""`_target_` in all its forms: found, announced, refused, checked against signatures, built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from steep.config.load import load_run_config
from steep.core.errors import ConfigError
from steep.core.section import Target
from steep.core.targets import TargetProblems, announce, build, check, find_targets, resolve

MODEL_FILE = """
from dataclasses import dataclass

@dataclass
class Part:
    size: int
    child: object = None

    @classmethod
    def double(cls, size: int):
        return cls(size * 2)

def build(vocab_size: int, width: int = 3, *, parts: list):
    return ("built", vocab_size, width, parts)

def anything(**options):
    return options

def fails(x=1):
    raise ValueError(f"no {x}")

def by_position(x, /):
    return x

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_model.py").write_text(MODEL_FILE, encoding="utf-8")


def target(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name, **arguments}


def problems(value: Any, **options: Any) -> list[str]:
    with pytest.raises(TargetProblems) as caught:
        check(value, **options)
    return list(caught.value.problems)


def test_a_file_target_with_nested_targets_in_mappings_and_lists() -> None:
    fraction = target("fractions.Fraction", numerator=1, denominator=3)
    parts = [
        target("./my_model.py:Part", size=1),
        {"deep": [target("my_model.py:Part.double", size=2)]},
        target("./my_model.py:Part", size=4, child=fraction),
    ]
    name, vocab_size, width, built = build(target("./my_model.py:build", vocab_size=7, parts=parts))
    assert (name, vocab_size, width) == ("built", 7, 3)
    assert built[0].size == 1
    assert built[1]["deep"][0].size == 4
    assert built[2].child == Fraction(1, 3)
    assert type(built[0]) is type(built[2]), "the file is imported once"


def test_an_absolute_file_leaves_sys_path_alone_and_a_changed_file_is_read_again(tmp_path: Path) -> None:
    before = list(sys.path)
    written = f"{tmp_path}/my_model.py:anything"
    assert build(target(written, a=1)) == {"a": 1}
    Path("my_model.py").write_text("def anything(**options):\n    return 'changed'\n", encoding="utf-8")
    assert build(target(written, a=1)) == "changed"
    assert sys.path == before
    assert "my_model" not in sys.modules


def test_extra_arguments_are_added_to_the_outer_call_only() -> None:
    found = build(target("./my_model.py:anything", a=target("./my_model.py:anything")), b=2)
    assert found == {"a": {}, "b": 2}
    with pytest.raises(TargetProblems, match="b is given by steep; leave it out"):
        build(target("./my_model.py:anything", b=1), b=2)
    with pytest.raises(TargetProblems, match="does not take 'other', which steep gives it"):
        build(target("./my_model.py:Part", size=1), other=2)


def test_library_callables_and_class_methods() -> None:
    import torch
    import transformers

    assert resolve("torch.nn.Linear") is torch.nn.Linear
    assert resolve("transformers.AutoModelForCausalLM.from_config") == transformers.AutoModelForCausalLM.from_config
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    config = target("transformers.GPT2Config", **sizes)
    model = build(target("transformers.AutoModelForCausalLM.from_config", config=config), allow_code=False)
    assert type(model) is transformers.GPT2LMHeadModel
    assert model.config.vocab_size == 11
    parameters = list(model.parameters())
    optimizer = build(target("torch.optim.AdamW", lr=1e-3), params=parameters, allow_code=False)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_all_wrong_arguments_are_reported_before_anything_is_called() -> None:
    called = target("./my_model.py:fails")
    value = target(
        "./my_model.py:build", vocabsize=3, _partial_=True, parts=[target("./my_model.py:Part", sise=1), called]
    )
    found = problems(value, location="model")
    assert found == [
        "model.parts.0: ./my_model.py:Part has no argument 'sise'; did you mean 'size'?",
        "model.parts.0: ./my_model.py:Part needs the argument 'size' (int), which is not given",
        "model: ./my_model.py:build has no argument 'vocabsize'; did you mean 'vocab_size'?",
        "model: ./my_model.py:build cannot be given '_partial_': of Hydra's keys steep knows only _target_",
        "model: ./my_model.py:build needs the argument 'vocab_size' (int), which is not given",
    ]
    with pytest.raises(TargetProblems):
        build(value)


def test_a_callable_that_takes_any_argument_and_one_without_a_signature() -> None:
    check(target("./my_model.py:anything", whatever=1))
    check(target("builtins.dict", a=1))
    assert any("takes 'x' by position only" in line for line in problems(target("./my_model.py:by_position")))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./my_modle.py:build", "the file ./my_modle.py does not exist; did you mean 'my_model.py'?"),
        ("./my_model.py:biuld", "the file my_model.py has no 'biuld'; did you mean 'build'?"),
        ("./my_model.py:Part.doubel", "Part has no 'doubel'; did you mean 'double'?"),
        ("./my_model.py:NUMBER", "./my_model.py:NUMBER is 3, which cannot be called"),
        ("./my_model.py:", "is not the name of a callable; write ./file.py:name"),
        ("./my_model.txt:build", "is not the name of a callable; write ./file.py:name"),
        ("build", "'build' is not the name of a callable"),
        ("my-pkg.build", "'my-pkg.build' is not the name of a callable"),
        (
            "my_model.build",
            "no package 'my_model' is installed, but it is in the current directory: write ./my_model.py:name",
        ),
        ("fraction.Fraction", "no package 'fraction' is installed; did you mean 'fractions'?"),
        ("fractions.fraction", "fractions has no 'fraction'; did you mean 'Fraction'?"),
        ("torch.optm.AdamW", "torch has no 'optm'; did you mean 'optim'?"),
        ("torch.optim.Adamw", "torch.optim has no 'Adamw'; did you mean 'AdamW'?"),
        ("transformers.AutoModelForCausaLM.from_config", "did you mean 'AutoModelForCausalLM'?"),
        ("fractions", "is not the name of a callable"),
        ("xml.dom", "xml.dom is a module; name a function or class in it"),
    ],
)
def test_names_that_lead_nowhere(name: str, words: str) -> None:
    assert any(words in line for line in problems(target(name)))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\ndef f(:\n", "mine.py:2: SyntaxError"),
        ("x = 1\n\ny = undefined_name\n", "mine.py:3: NameError: name 'undefined_name' is not defined"),
        ("def g():\n    return 1 / 0\ng()\n", "mine.py:2: ZeroDivisionError"),
        ("import beside\n", "beside is beside it, but a file is imported alone: set PYTHONPATH="),
    ],
)
def test_errors_in_the_users_file_show_file_and_line(source: str, words: str) -> None:
    Path("mine.py").write_text(source, encoding="utf-8")
    Path("beside.py").write_text("", encoding="utf-8")
    assert any(words in line for line in problems(target("./mine.py:f")))
    assert not any(name.startswith("steep_target_mine") for name in sys.modules), "a half-imported file is forgotten"


def test_an_error_of_the_call_shows_file_and_line_and_keeps_its_cause() -> None:
    with pytest.raises(
        ConfigError, match=r"model: \./my_model\.py:fails failed: my_model\.py:20: ValueError: no 5"
    ) as caught:
        build(target("./my_model.py:fails", x=5), location="model")
    assert isinstance(caught.value.__cause__, ValueError)


def test_finding_targets_in_a_configuration_inner_ones_first() -> None:
    Path("a.txt").write_text("x", encoding="utf-8")
    config = load_run_config(
        mapping={
            "model": target("a.b", part=target("c.d"), parts=[1, {"x": target("e.f")}]),
            "data": {"train": [{"path": "a.txt"}]},
            "trackers": [{"name": "jsonl"}, target("g.h")],
        }
    )
    found = [(location, found.target) for location, found in find_targets(config)]
    assert found == [("model.part", "c.d"), ("model.parts.1.x", "e.f"), ("model", "a.b"), ("trackers.1", "g.h")]
    with pytest.raises(TargetProblems, match=r"x\._target_: 3 is not the name of a callable"):
        find_targets({"x": {"_target_": 3}})


def test_announcing_imports_nothing(tmp_path: Path) -> None:
    Path("loud.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    value = {
        "model": target("./loud.py:build", inner=target("some_pkg.f")),
        "optimizer": target("torch.optim.AdamW"),
        "x": target("torch.load"),
    }
    said: list[str] = []
    announce(value, said.append)
    assert said == [
        "model.inner: runs some_pkg.f (Python package 'some_pkg')",
        f"model: runs build of the file {tmp_path / 'loud.py'}",
        "x: runs torch.load (Python package 'torch')",
    ]


def test_finding_and_announcing_need_no_torch() -> None:
    program = (
        "import sys\nfrom steep.core.targets import announce\nannounce({'_target_': 'torch.load'}, print)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


ALLOWED = [
    "torch.nn.Linear",
    "torch.optim.AdamW",
    "torch.optim.lr_scheduler.LambdaLR",
    "transformers.LlamaForCausalLM",
    "transformers.LlamaConfig",
    "torch.nn.CrossEntropyLoss",
    "transformers.AutoModelForCausalLM.from_config",
    "transformers.AutoConfig.for_model",
    "transformers.PreTrainedTokenizerFast",
    "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    "steep.models.gpt2.build_gpt2_model",
    "steep.optim.optimizers.muon.build",
]
REFUSED = [
    "transformers.AutoModelForCausalLM.from_pretrained",
    "transformers.LlamaForCausalLM.from_pretrained",
    "transformers.AutoTokenizer.from_pretrained",
    "transformers.AutoConfig.from_pretrained",
    "transformers.Trainer",
    "transformers.LlamaConfig.from_json_file",
    "torch.nn.parallel.DistributedDataParallel",
    "torch.nn.utils.skip_init",
    "torch.optim.swa_utils.update_bn",
    "steep.models.load.load_model",
    "steep.models.config.ModelConfig",
    "steep.optim.config.OptimizerConfig",
    "steep.trackers.backends.jsonl.build",
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "./my_model.py:build",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.utils.cpp_extension.load",
    "torch.utils.collect_env.run",
    "torch.serialization.load",
    "torch._utils.x",
    "torch.nn.modules.module.torch.load",
    "torch.nn.Linear.__init__",
    "torch.nn.modules.module.functools.partial",
    "torch.nn.init.normal_",
    "transformers.os.system",
    "transformers.utils.import_utils.os.system",
    "transformers.pipeline",
    "transformers.generation.utils.torch.load",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "transformers.AutoModelForCausalLM.register",
    "transformers.PreTrainedModel.push_to_hub",
    "transformers.testing_utils.subprocess.run",
    "steep.core.files.write_text",
    "steep.core.targets.build",
    "steep.models.config.Optional",
    "steep.models.config.Any",
]


@pytest.mark.parametrize("name", ALLOWED)
def test_what_no_code_allows(name: str) -> None:
    assert callable(resolve(name, allow_code=False))


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_code_refuses(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is refused by --no-code|has no "):
        resolve(name, allow_code=False)
    with pytest.raises(ConfigError):
        build(target(name), allow_code=False)


def test_no_code_refuses_everything_at_once_and_imports_nothing() -> None:
    Path("loud.py").write_text(f"open({os.path.abspath('ran')!r}, 'w')\n", encoding="utf-8")
    value = target("torch.nn.Linear", a=target("./loud.py:build"), b=[target("os.system", command="touch ran")])
    found = problems(value, allow_code=False, location="model")
    assert found == [
        "model.a: ./loud.py:build is refused by --no-code: it is code in a file",
        "model.b.0: os.system is refused by --no-code: it is code of the package 'os'",
    ]
    assert not Path("ran").exists()


TRUE = {"_target_": "torch.nn.Identity"}
"""A true value in disguise."""


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": True},
        {"trust_remote_code": "no"},
        {"trust_remote_code": TRUE},
        {"use_kernels": True},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"config": {"trust_remote_code": True}},
        {"attn_implementation": {"text": "org/kernel"}},
        {"weights_only": False},
        {"use_safetensors": TRUE},
        {"_attn_implementation": "sdpa"},
        {"tokenizer_file": "tokenizer.json"},
    ],
)
def test_no_code_refuses_arguments_that_run_code_or_read_files(arguments: dict[str, Any]) -> None:
    config = target("transformers.LlamaConfig")
    value = target("transformers.AutoModelForCausalLM.from_config", **{"config": config, **arguments})
    assert any("which --no-code refuses" in line for line in problems(value, allow_code=False))
    check(value)


def test_no_code_looks_at_what_nested_targets_became(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the first look missed it, nothing is called with it."""
    value = target("torch.nn.Linear", in_features=2, out_features=2, trust_remote_code=TRUE)
    monkeypatch.setattr("steep.core.targets.building.check", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="trust_remote_code: Identity.* which --no-code refuses"):
        build(value, allow_code=False)


def test_a_folder_with_code_does_not_run_under_no_code() -> None:
    Path("evil").mkdir()
    Path("evil/config.json").write_text(
        json.dumps({"auto_map": {"AutoModelForCausalLM": "code.Evil"}, "model_type": "evil"})
    )
    Path("evil/code.py").write_text(f"open({os.path.abspath('ran')!r}, 'w')\n", encoding="utf-8")
    value = target(
        "transformers.AutoModelForCausalLM.from_pretrained",
        pretrained_model_name_or_path="./evil",
        trust_remote_code=TRUE,
    )
    with pytest.raises(ConfigError, match="is refused by --no-code: it reads files or the hub"):
        build(value, allow_code=False)
    assert not Path("ran").exists()


def test_ordinary_arguments_pass_under_no_code() -> None:
    value = target(
        "transformers.AutoModelForCausalLM.from_config",
        config=target("transformers.LlamaConfig", hidden_size=8),
        trust_remote_code=False,
        attn_implementation="sdpa",
    )
    check(value, allow_code=False)


def test_a_target_object_is_as_good_as_a_mapping() -> None:
    found = Target.model_validate(target("./my_model.py:anything", a=1))
    check(found)
    assert build(found) == {"a": 1}
    with pytest.raises(TypeError, match="needs a Target"):
        build({"a": 1})
