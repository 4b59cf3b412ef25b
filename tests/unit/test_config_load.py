"""The configuration's front door: files, overrides, and every mistake in one error with its line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from steep.config.errors import ConfigProblems
from steep.config.keys import all_keys, dotted
from steep.config.load import load_run_config, write_config
from steep.config.suggestions import SYNONYMS
from steep.core.errors import ConfigError
from steep.core.section import Target

MINIMAL: dict[str, Any] = {"model": {"pretrained": "some/model"}, "data": {"train": [{"path": "corpus/a.txt"}]}}


@pytest.fixture(autouse=True)
def _corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    Path("corpus/a.txt").write_text("text", encoding="utf-8")
    Path("corpus/b.txt").write_text("text", encoding="utf-8")


def write(text: str, name: str = "run.yaml") -> Path:
    Path(name).write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return Path(name)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigProblems) as caught:
        load_run_config(write(text), overrides)
    return list(caught.value.lines)


def minimal_with(section: str = "") -> str:
    return "model: {pretrained: some/model}\ndata: {train: [{path: corpus/a.txt}]}\n" + textwrap.dedent(section).lstrip(
        "\n"
    )


def test_a_whole_configuration_is_read() -> None:
    path = write("""
        run:     {name: manuals, seed: 1_000}
        model:   {pretrained: some/model}
        data:
          sequence_length: 512
          train: [{path: corpus/*.txt}]
          validation: {domain: {share: 0.1}}
        train:    {global_batch_size: 64, micro_batch_size: 4, tokens: 2B, max_seconds: 30min, compile: no}
        optimizer: {learning_rate: 1e-4, betas: [0.9, 0.99]}
        schedule:
        evaluate: {tokens: 200k}
    """)
    config = load_run_config(path)
    assert (config.run.seed, config.train.tokens, config.train.max_seconds) == (1000, 2 * 10**9, 1800.0)
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.train.compile is False
    assert config.schedule.name == "cosine"
    assert config.evaluate.tokens == 200_000


def test_precedence_is_defaults_file_command_line() -> None:
    path = write(minimal_with("optimizer: {learning_rate: 1e-4, weight_decay: 0.2}"))
    config = load_run_config(path, ["--optimizer.learning_rate", "3e-4"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.weight_decay == 0.2
    assert config.optimizer.eps == 1e-8


@pytest.mark.parametrize(
    ("arguments", "read", "expected"),
    [
        (["--train.compile"], lambda c: c.train.compile, True),
        (["--train.compile=false"], lambda c: c.train.compile, False),
        (["--train.compile", "--train.steps", "7"], lambda c: (c.train.compile, c.train.steps), (True, 7)),
        (["--data.train.0.path=corpus/b.txt"], lambda c: c.data.train[0].path, "corpus/b.txt"),
        (
            ["--data.train.1.path=corpus/b.txt"],
            lambda c: [s.path for s in c.data.train],
            ["corpus/a.txt", "corpus/b.txt"],
        ),
        (["--data.train", "[{path: corpus/b.txt}]"], lambda c: c.data.train[0].path, "corpus/b.txt"),
        (["--data.train.0.path", "corpus/*.txt"], lambda c: c.data.train[0].path, "corpus/*.txt"),
        (
            ["--data.train.0.path", '["corpus/a.txt", "corpus/b.txt"]'],
            lambda c: c.data.train[0].path,
            ["corpus/a.txt", "corpus/b.txt"],
        ),
        (["--data.validation.domain.share", "0.1"], lambda c: c.data.validation["domain"].share, 0.1),
        (["--optimizer.betas", "[0.8, 0.9]"], lambda c: c.optimizer.betas, (0.8, 0.9)),
        (["--train.max_grad_norm", "null"], lambda c: c.train.max_grad_norm, None),
        (["--train.tokens", "500M"], lambda c: c.train.tokens, 500_000_000),
        (["--optimizer.weight_decay", "-0.0"], lambda c: c.optimizer.weight_decay, 0.0),
        (["--evaluate.prompts", "['no', \"a: b\"]"], lambda c: c.evaluate.prompts, ["no", "a: b"]),
        (["--run.name=a-b", "--run.name", "last"], lambda c: c.run.name, "last"),
        (["--run.directory", "a: b #c"], lambda c: c.run.directory, "a: b #c"),
        (
            ["--model.pretrained=null", "--model.config={model_type: llama}"],
            lambda c: c.model.config,
            {"model_type": "llama"},
        ),
    ],
)
def test_overrides(arguments: list[str], read: Any, expected: Any) -> None:
    assert read(load_run_config(write(minimal_with()), arguments)) == expected


@pytest.mark.parametrize(
    ("section", "in_file", "typed", "kept"),
    [
        ("train", "epochs: 2", "--train.steps=10", {"epochs": None, "steps": 10, "tokens": None}),
        ("train", "steps: 5", "--train.tokens=1M", {"epochs": None, "steps": None, "tokens": 1_000_000}),
        ("evaluate", "every_ratio: 0.5", "--evaluate.every_steps=5", {"every_steps": 5, "every_ratio": None}),
        ("schedule", "warmup_ratio: 0.1", "--schedule.warmup_steps=3", {"warmup_ratio": None, "warmup_steps": 3}),
    ],
)
def test_an_override_replaces_what_says_the_same_in_another_unit(
    section: str, in_file: str, typed: str, kept: dict[str, Any]
) -> None:
    length = "" if section == "train" else "train: {steps: 9}\n"
    texts = "--data.validation={domain: {share: 0.1}}"
    config = load_run_config(write(minimal_with(f"{length}{section}: {{{in_file}}}\n")), [typed, texts])
    assert {key: getattr(getattr(config, section), key) for key in kept} == kept


def test_two_lengths_on_the_command_line_are_refused() -> None:
    with pytest.raises(ConfigError, match="epochs and steps; give one of them"):
        load_run_config(write(minimal_with("train: {tokens: 5k}")), ["--train.steps=10", "--train.epochs=1"])


def test_overrides_alone_make_a_configuration() -> None:
    config = load_run_config(None, ["--model.pretrained", "some/model", "--data.train.0.path", "corpus"])
    assert config.data.train[0].path == "corpus"


def test_a_target_can_be_given_on_the_command_line() -> None:
    config = load_run_config(None, ["--model._target_=my_pkg.build", "--model.size", "3", "--data.train.0.path=corpus"])
    assert isinstance(config.model, Target)
    assert (config.model.target, config.model.arguments) == ("my_pkg.build", {"size": 3})


def test_overrides_with_mistakes_name_the_override() -> None:
    lines = problems(
        minimal_with(),
        "--optimizer.lr",
        "3e-4",
        "--train.steps",
        "-5",
        "--data.train.3.path=x",
        "--train.threads",
        "--model.pretrained.x=1",
        "stray",
        "--train.tokens=",
    )
    assert (
        "--optimizer.lr 3e-4: optimizer.lr: there is no such key (given 0.0003); did you mean --optimizer.learning_rate?"
        in lines
    )
    assert any(line.startswith("--train.steps -5: train.steps: -5 is out of range") for line in lines)
    assert any(line.startswith("--data.train.3.path=x: data.train has no entry 3") for line in lines)
    assert any(line.startswith("--train.threads: train.threads: has no value") for line in lines)
    assert any(
        line.startswith("--model.pretrained.x=1: model.pretrained is 'some/model', which has no keys") for line in lines
    )
    assert any(line.startswith("stray: does not belong to a key") for line in lines)
    assert any(line.startswith("--train.tokens=: has no value") for line in lines)


def test_every_mistake_in_one_error_each_with_its_line() -> None:
    lines = problems("""
        model:
          pretraind: some/model
        data:
          sequence_length: 4k
          train:
            - {path: corpsu/a.txt, weigth: 0.95}
        train:
          learning_rate: 1e-4
          global_batch_size: 10
          micro_batch_size: 4
          precision: bf-16
        schedule: {warmup_steps: 200}
        optimizer:
          learning_rate: fast
        evaluate:
          tokens: 2Q
        nonsense: 1
    """)
    expected = [
        "run.yaml:2: model.pretraind: there is no such key (given 'some/model'); did you mean model.pretrained?",
        "run.yaml:4: data.sequence_length: '4k' is not a whole number of at least 2; write 4000",
        "run.yaml:6: data.train.0.path: 'corpsu/a.txt' does not exist; did you mean 'corpus/a.txt'?",
        "run.yaml:6: data.train.0.weigth: there is no such key (given 0.95); did you mean data.train.0.weight?",
        "run.yaml:8: train.learning_rate: there is no such key (given 1e-4); did you mean optimizer.learning_rate?",
        "run.yaml:9: train: global_batch_size=10 is not a multiple of micro_batch_size=4; ",
        "run.yaml:11: train.precision: 'bf-16' is not a choice; did you mean 'bf16'? It can be: auto, mixed_bf16, ",
        "run.yaml:14: optimizer.learning_rate: 'fast' is not a number above 0",
        "run.yaml:16: evaluate.tokens: '2Q' is not a count; write it like 2000, 500M or 2B",
        "run.yaml:17: nonsense: there is no such key (given 1). The sections are: run, recipe, model, ",
    ]
    assert len(lines) == len(expected), "\n".join(lines)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_a_misspelt_key_does_not_hide_its_wrong_value_nor_ask_for_the_key() -> None:
    lines = problems("model: {pretrained: a/b}\ndata: {train: [{pth: corpus/a.txt}]}\ntrain: {stepz: -3}\n")
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "data.train.0.pth",
        "train.stepz",
        "train.steps",
    ]


@pytest.mark.parametrize(
    ("lines", "misspelt"),
    [
        ("train: {global_batch_size: 1, micro_batch_sise: 2}", "train.micro_batch_sise"),
        ("train: {global_batch_sise: 4, micro_batch_size: 8}", "train.global_batch_sise"),
        ("train: {steps: 3, epocs: 2}", "train.epocs"),
        ("train: {stepz: 3}\nschedule: {warmup_steps: 5}", "train.stepz"),
    ],
)
def test_what_is_wrong_only_if_a_guess_is_right_is_not_listed(lines: str, misspelt: str) -> None:
    """The rest of the section is still checked: a mismatch that names no guessed key is listed."""
    base = "model: {pretrained: a/b}\ndata: {train: [{path: corpus/a.txt}]}\n"
    (line,) = problems(base + lines)
    assert f"{misspelt}: there is no such key" in line
    other = problems(base + "train: {stepz: 3, global_batch_size: 10, micro_batch_size: 4}")
    assert ["global_batch_size=10" in line for line in other] == [False, True]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("train: {steps: true}", "train.steps: true is not a count such as 2000, 500M or 2B, at least 1"),
        ("optimizer: {learning_rate: true}", "optimizer.learning_rate: true is not a number above 0"),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate: inf is not a finite number"),
        ("train: {tokens: .inf}", "train.tokens: inf is not a finite number"),
        ("train: {tokens: 1e999}", "train.tokens: inf is not a finite number"),
        ("train: {tokens: '1e999'}", "train.tokens: '1e999' is not a whole number"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: [0.9] is too short; a list of 2 numbers is needed"),
        ("run: {name: 010}", "run.name: 10 is a number; text is needed; put it in quotes: '010'"),
        ("run: {name: my run}", "as in 'my-run'"),
        ("evaluate: {prompts: hello}", "evaluate.prompts: 'hello' is not a list of texts; write [hello]"),
        ("console: 3", "console: 3 is a number; a mapping of keys to values is needed"),
        ("train: {max_grad_norm: None}", "for no value write null"),
        ("train: {epochs: 1, steps: 5}", "train: the run's length is given by epochs and steps; give one of them"),
        ("schedule: {warmup_steps: 20}\ntrain: {steps: 20}", "schedule.warmup_steps: 20 is not below train.steps = 20"),
        ("evaluate: {sample_every_steps: 5}", "evaluate.sample_every_steps: there are no evaluate.prompts"),
        ("evaluate: {every_steps: 5}", "evaluate.every_steps: there is no text to score"),
        ("trackers: [{name: tensorbord}]", "trackers.0.name: there is no 'tensorbord'; did you mean 'tensorboard'?"),
        ("trackers: [{}]", "trackers.0.name: is needed and not given (the tracker"),
        ("tokenizer: {pretrained: ./tok}", "tokenizer.pretrained: './tok' does not exist"),
        ("optimizer: {_target_: ./opt.py:build}", "optimizer._target_: the file './opt.py' does not exist"),
        ("train: {device: gpu}", "train.device: 'gpu' is not a device; did you mean 'cuda'?"),
        (
            "checkpoint: {every: 5}",
            "checkpoint.every: there is no such key (given 5); did you mean checkpoint.every_steps?",
        ),
        ("optimizer: adamw", "optimizer: 'adamw' is not a mapping of keys to values; write {name: adamw}"),
        ("schedule: cosine", "write {name: cosine}"),
        ("trainer: {}", "trainer: there is no such key; did you mean train?"),
    ],
)
def test_one_mistake(section: str, words: str) -> None:
    lines = problems(minimal_with(section))
    assert len(lines) == 1, lines
    assert words in lines[0]
    assert lines[0].startswith("run.yaml:3: ") or lines[0].startswith("run.yaml:4: ")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("train: corpus/a.txt", "data.train: 'corpus/a.txt' is not a list of mappings; write [{path: corpus/a.txt}]"),
        ("train: {path: corpus/a.txt}", "a list of mappings is needed; write [{path: …}]"),
        ("train: []", "data.train: is empty; at least one entry is needed"),
        (
            "train: [{path: 3}]",
            "data.train.0.path: 3 is a number; text or a list of texts is needed; put it in quotes: '3'",
        ),
        ("train: [{path: [corpus/a.txt, 3]}]", "data.train.0.path.1: 3 is a number; text is needed"),
        ("train: [{path: corpus/*.jsonl}]", "matches no file; 'corpus' holds .txt (2), for example 'a.txt'"),
        ("train: [{path: 's3://bucket/x'}]", "is remote; steep reads local files"),
        ("train: [{path: $HOME/x}]", "environment variables are not expanded"),
        ("train: [{path: corpus/a.txt, name: x}, {path: corpus/b.txt, name: x}]", "2 sources are called 'x'"),
        (
            "{train: [{path: corpus/a.txt}], validation: [{path: corpus/b.txt}]}",
            "give each a name, as in {domain: {path: …}}",
        ),
        ("{train: [{path: corpus/a.txt}], validation: {d: {}}}", "data.validation.d: give either path"),
        (
            "{train: [{path: corpus/a.txt}], validation: {d: {share: 2}}}",
            "2 is out of range; a number above 0 and below 1 is needed",
        ),
    ],
)
def test_one_mistake_in_data(data: str, words: str) -> None:
    body = data if data.startswith("{") else f"{{{data}}}"
    lines = problems(f"model: {{pretrained: a/b}}\ndata: {body}\n")
    assert any(words in line and line.startswith("run.yaml:2: ") for line in lines), lines


def test_a_source_given_in_the_wrong_place_is_not_also_missing() -> None:
    lines = problems("model: {pretrained: a/b}\ndata: {path: corpus/a.txt}\n")
    assert lines == [
        "run.yaml:2: data.path: there is no such key (given 'corpus/a.txt'); did you mean data.train.0.path?"
    ]


def test_what_is_missing_is_named_with_an_example() -> None:
    lines = problems("train: {steps: 5}\n")
    assert any("model: is needed and not given" in line and "pretrained: HuggingFaceTB" in line for line in lines)
    assert any("data: is needed and not given" in line and "train: [{path:" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "run.yaml:1: is empty"),
        (b"# only a comment\n", "run.yaml:1: is empty"),
        (b"- 1\n- 2\n", "run.yaml:1: holds a list"),
        (b"model\n", "run.yaml:1: holds the text 'model'"),
        (b"model: {pretrained: caf\xe9}\n", "run.yaml:1: is not UTF-8: byte 0xE9"),
        (b"model:\n\tpretrained: a\n", "run.yaml:2: this is not valid YAML"),
        (b"a: 1\nmodel: {pretrained: x\n", "run.yaml:3: this is not valid YAML"),
        (b"data: {train: [{path: *.jsonl}]}\n", "A text that starts with * needs quotes"),
        (b"a: 1\n---\nb: 2\n", "A configuration is one document"),
        (b"a: \x00\n", "U+0000 is not allowed"),
        (b"a: " + b"[" * 5000, "run.yaml:1: "),
        (b"#" * 6_000_000, "is larger than 5 MB"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, words: str) -> None:
    Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run_config("run.yaml")
    assert words in str(caught.value)


def test_files_that_are_not_there() -> None:
    write(minimal_with())
    with pytest.raises(ConfigError, match=r"did you mean 'run\.yaml'"):
        load_run_config("run")
    with pytest.raises(ConfigError, match=r"runn\.yaml: does not exist; did you mean 'run\.yaml'"):
        load_run_config("runn.yaml")
    with pytest.raises(ConfigError, match="corpus: is a folder"):
        load_run_config("corpus")


def test_duplicate_keys_are_an_error_with_both_lines() -> None:
    lines = problems(minimal_with("train: {steps: 5}\nschedule: {}\ntrain: {steps: 6}\n"))
    assert lines == ["run.yaml:3: train: is given twice, in line 3 and in line 5; keep one of them"]


def test_alias_bombs_and_cycles_are_refused() -> None:
    layers = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        layers += f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 10) + "]\n"
    assert any("expand to more than 100,000 values" in line for line in problems(layers))
    assert any("contains it" in line for line in problems("model: &m {pretrained: a, x: *m}\n"))


def test_anchors_and_merge_keys_work_and_tags_do_not() -> None:
    config = load_run_config(
        write("""
        model: {pretrained: a/b}
        data:
          train: [&source {path: corpus/a.txt, text_key: body}, {<<: *source, path: corpus/b.txt}]
    """)
    )
    assert [(s.path, s.text_key) for s in config.data.train] == [("corpus/a.txt", "body"), ("corpus/b.txt", "body")]
    assert any(
        "the tag !!python/object/apply:os.system is not understood" in line
        for line in problems("model: !!python/object/apply:os.system [ls]\n")
    )


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "off",
        "1e-4",
        "010",
        "0x1f",
        "1:30",
        "2024-01-01",
        "null",
        "~",
        "",
        " x ",
        "a: b",
        "=",
        "1_000",
        "true",
        "*a",
        "# x",
        "é\nü",
        "<<",
        "0o7",
        ".inf",
    ],
)
def test_texts_survive_writing_and_reading_by_steep_and_by_stock_yaml(text: str) -> None:
    config = load_run_config(mapping={**MINIMAL, "evaluate": {"prompts": [text]}})
    write_config(config, "out.yaml")
    assert load_run_config("out.yaml") == config
    assert yaml.safe_load(Path("out.yaml").read_text(encoding="utf-8")) == config.to_mapping()


def test_the_written_configuration_gives_an_equal_one() -> None:
    mapping = {
        **MINIMAL,
        "model": {"_target_": "my_pkg.build", "sizes": [1, 2.5e-7, None], "part": {"_target_": "a.b"}},
        "trackers": [{"name": "tensorboard", "flush": 3}, {"_target_": "c.d"}],
        "train": {"max_seconds": "1.5h", "loss_chunk_bytes": "8MiB", "tokens": "1.5B"},
        "optimizer": {"learning_rate": 2e-5},
    }
    config = load_run_config(mapping=mapping)
    write_config(config, "out.yaml")
    assert load_run_config("out.yaml") == config


def test_notebooks_give_plain_values_and_get_problems_without_lines() -> None:
    source = {"path": Path("corpus/a.txt")}
    config = load_run_config(mapping={"model": {"pretrained": "a/b"}, "data": {"train": (source,)}})
    assert config.data.train[0].path == os.path.join("corpus", "a.txt")
    assert load_run_config(mapping=config.to_mapping()) == config
    with pytest.raises(ConfigProblems) as caught:
        load_run_config(mapping={**MINIMAL, "train": {"lr": 1}})
    assert caught.value.lines == ("train.lr: there is no such key (given 1); did you mean optimizer.learning_rate?",)
    assert caught.value.problems[0].location == ("train", "lr")


def test_a_mapping_is_not_changed() -> None:
    mapping = {**MINIMAL, "train": None}
    load_run_config(mapping=mapping, overrides=["--data.train.0.path=corpus/b.txt"])
    assert mapping["train"] is None
    assert MINIMAL["data"]["train"][0]["path"] == "corpus/a.txt"


def test_another_tools_flat_configuration_is_told_key_by_key_where_things_go() -> None:
    lines = problems("""
        model_name_or_path: a/b
        stage: pt
        dataset: demo
        cutoff_len: 2048
        learning_rate: 1.0e-4
        num_train_epochs: 3.0
        plot_loss: true
    """)
    suggested = [line.partition("did you mean ")[2].partition("?")[0] for line in lines]
    assert suggested == [
        "model.pretrained",
        "",
        "data.train",
        "data.sequence_length",
        "optimizer.learning_rate",
        "train.epochs",
        "",
    ]
    assert sum("The sections are:" in line for line in lines) == 1


def test_a_wrong_section_in_an_override_names_the_override() -> None:
    lines = problems(minimal_with(), "--optimiser.learning_rate", "1e-4")
    assert lines == ["--optimiser.learning_rate 1e-4: optimiser: there is no such key; did you mean optimizer?"]


def test_every_synonym_leads_to_a_key_that_exists() -> None:
    known = {dotted(location) for location in all_keys()}
    assert {word: target for word, (target, _) in SYNONYMS.items() if target not in known} == {}


@pytest.mark.parametrize("value", ["canary-secret-9f8e7d", "hf_abcdefghijklmnopqrstuv"])
def test_a_secret_in_a_wrong_place_is_not_shown(value: str) -> None:
    lines = problems(minimal_with(f"train: {{api_key: {value}}}"))
    assert value not in "\n".join(lines)


def test_a_bad_file_is_reported_without_torch() -> None:
    write(minimal_with("train: {lr: 1e-4}"))
    program = (
        "import sys\nfrom steep.config.load import load_run_config\nfrom steep.core.errors import ConfigError\n"
        "try:\n    load_run_config('run.yaml')\nexcept ConfigError as error:\n    print(error)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'pyarrow') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "did you mean optimizer.learning_rate?" in done.stdout


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        (True, True),
        (False, False),
        (None, False),
        ("full", True),
        ({"mode": "full"}, True),
        ({"mode": "full", "offload": False}, True),
        ("selective", "selective"),
        ({"mode": "selective"}, "selective"),
        ({"offload": True}, {"mode": "full", "offload": True}),
        ({"mode": "every_nth"}, {"mode": "every_nth", "every": 2}),
        ({"mode": "every_nth", "every": 3, "offload": True}, {"mode": "every_nth", "every": 3, "offload": True}),
    ],
)
def test_activation_checkpointing_is_resolved_to_its_shortest_form(written: Any, resolved: Any) -> None:
    """Two ways to write one thing must not differ when a run is resumed, nor from what older runs wrote."""
    config = load_run_config(mapping={**MINIMAL, "train": {"activation_checkpointing": written}})
    saved = config.to_mapping()["train"]["activation_checkpointing"]
    assert saved == resolved
    again = load_run_config(mapping={**MINIMAL, "train": {"activation_checkpointing": saved}})
    assert again.train.activation_checkpointing == config.train.activation_checkpointing


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"activation_checkpointing": "some"}, "'some' is not valid here; use true, false, full, selective"),
        ({"activation_checkpointing": {"mode": "selectve"}}, "did you mean 'selective'"),
        ({"activation_checkpointing": {"mode": "every_nth", "every": 1}}, "at least 2"),
        ({"activation_checkpointing": {"every": 4}}, "every=4 is given with mode full"),
        ({"activation_checkpointing": {"ofload": True}}, "did you mean train.activation_checkpointing.offload"),
        ({"activation_checkpointing": 3}, "train.activation_checkpointing: 3 is a number"),
        ({"activation_checkpointing": "selective", "compile": True}, "which compile fuses"),
    ],
)
def test_activation_checkpointing_mistakes(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(mapping={**MINIMAL, "train": train})
