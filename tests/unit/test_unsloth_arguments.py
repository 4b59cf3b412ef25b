"""Arguments of Unsloth's notebooks: every one is translated, explained in a line, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from steep.config.load import load_run_config
from steep.core.errors import ConfigError
from steep.unsloth import UnslothTrainingArguments
from steep.unsloth.translate import check_keys, refuse, say_ignored

GUIDE: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 1,
    "learning_rate": 5e-5,
    "embedding_learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "fp16": True,
    "bf16": False,
    "optim": "adamw_8bit",
    "weight_decay": 0.00,
    "logging_steps": 1,
    "report_to": "none",
    "seed": 3407,
    "output_dir": "outputs",
}


def test_the_guides_arguments_become_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = UnslothTrainingArguments(**GUIDE)
    assert capsys.readouterr().err == ""
    sections = arguments.sections()
    assert sections["train"] == {
        "max_grad_norm": 1.0,
        "compile": False,
        "epochs": 1,
    }
    optimizer = sections["optimizer"]
    assert (optimizer["name"], optimizer["learning_rate"]) == ("adamw_8bit", 5e-5)
    assert optimizer["embedding_learning_rate"] == 5e-6
    assert optimizer["betas"] == (0.9, 0.999)  # transformers', not steep's
    assert sections["schedule"] == {"name": "cosine", "final_ratio": 0.0, "warmup_ratio": 0.1}
    assert sections["run"] == {"directory": "outputs", "seed": 3407}
    model = {"pretrained": "hub/somewhere"}
    data = {"sequence_length": 2048, "train": [{"path": __file__}]}
    adapter = {"rank": 8, "modules_to_save": ["embed_tokens"]}
    load_run_config(
        mapping={**sections, "model": model, "data": data, "adapter": adapter}
    )  # every key is one of steep's


def test_what_is_left_out_is_transformers_default() -> None:
    sections = UnslothTrainingArguments().sections()
    assert sections["train"]["epochs"] == 3.0
    assert sections["optimizer"]["weight_decay"] == 0.0
    assert sections["schedule"] == {"name": "linear", "final_ratio": 0.0, "warmup_ratio": 0.0}


def test_max_steps_wins_over_epochs() -> None:
    train = UnslothTrainingArguments(max_steps=60, num_train_epochs=2).sections()["train"]
    assert train["steps"] == 60
    assert "epochs" not in train


def test_a_typing_error_is_named_with_what_was_meant() -> None:
    with pytest.raises(ConfigError, match="no argument 'learning_rat'. Did you mean 'learning_rate'"):
        UnslothTrainingArguments(learning_rat=1e-4)


def test_what_means_nothing_is_said_once_and_what_is_switched_off_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    UnslothTrainingArguments(dataset_num_proc=8, group_by_length=False, push_to_hub=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "dataset_num_proc=8 has no effect here: text is read by steep's own processes" in lines[0]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"neftune_noise_alpha": 5}, "noise on embeddings"),
        ({"optim": "sgd"}, "no counterpart"),
        ({"lr_scheduler_type": "polynomial"}, "no counterpart"),
        ({"report_to": "wandb"}, "report_to='wandb' is not supported"),
    ],
)
def test_what_would_change_the_result_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        UnslothTrainingArguments(**given).sections()


def test_refusing_and_ignoring_look_at_the_value(capsys: pytest.CaptureFixture[str]) -> None:
    refuse("f", {"loftq_config": None, "neft": 0}, {"loftq_config": "why", "neft": "why"})
    with pytest.raises(ConfigError, match="loftq_config=.* is not supported: why"):
        refuse("f", {"loftq_config": {"bits": 4}}, {"loftq_config": "why"})
    say_ignored("f", {"a": None, "b": 1}, {"a": "x", "b": "y"})
    assert capsys.readouterr().err == "steep: f: b=1 has no effect here: y\n"
    with pytest.raises(ConfigError, match="from_unsloth.md"):
        check_keys("f", ["zzzz"], ["rank"])


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({"warmup_steps": 0.1}, {"name": "linear", "final_ratio": 0.0, "warmup_ratio": 0.1}),
        ({"warmup_steps": 5}, {"name": "linear", "final_ratio": 0.0, "warmup_steps": 5}),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-6}, "learning_rate": 5e-5},
            {"name": "cosine", "final_ratio": pytest.approx(0.1), "warmup_ratio": 0.0},
        ),
    ],
)
def test_a_schedule_is_the_one_that_was_asked_for(given: dict[str, Any], schedule: dict[str, Any]) -> None:
    assert UnslothTrainingArguments(**given).sections()["schedule"] == schedule


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp16": True, "bf16": True}, "both true"),
        ({"load_best_model_at_end": True}, "the best checkpoint is kept"),
        ({"resume_from_checkpoint": "outputs"}, "--resume"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "num_cycles, which has no counterpart"),
        ({"logging_steps": 0.1}, "a share of the run; give steps"),
    ],
)
def test_what_cannot_be_done_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UnslothTrainingArguments(**given).sections()


def test_every_argument_of_transformers_that_is_known_is_in_one_table_only() -> None:
    from steep.unsloth import arguments

    tables = [set(table) for table in (arguments.DEFAULTS, arguments.MEANS_NOTHING, arguments.CANNOT)]
    assert sum(map(len, tables)) == len(set.union(*tables))


def test_the_defaults_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    theirs = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    ours = UnslothTrainingArguments()
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
                 "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"):  # fmt: skip
        assert getattr(ours, name) == theirs[name], name
