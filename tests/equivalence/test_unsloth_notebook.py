"""A notebook written for Unsloth, with its import lines changed: what it trains, writes and saves is what steep trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer

import steep
from steep.core.errors import ConfigError, DataError
from steep.models.fresh import build_fresh
from steep.reporting.plots import memory_plot
from steep.unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported
from support import LLAMA

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


def write_base(folder: Path, tokenizer: Path, tied: bool) -> Path:
    build_fresh({**LLAMA, "tie_word_embeddings": tied}, None, seed=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def each_base(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_tokenizer_directory, request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_tokenizer_directory, tied=True)


def load(base: Path, **given: Any) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(
        **{"model_name": str(base), "max_seq_length": 64, "dtype": None, "load_in_4bit": False, **given}
    )


def adapt(model: Any, **given: Any) -> Any:
    return FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, use_rslora=True, target_modules=TARGETS, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=3407, loftq_config=None, **given,
    )  # fmt: skip


def trainer_of(model: Any, tokenizer: Any, dataset: Any, folder: Path, **given: Any) -> UnslothTrainer:
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "learning_rate": 1e-2,
        "embedding_learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "fp16": not is_bfloat16_supported(), "bf16": is_bfloat16_supported(), "optim": "adamw_torch", "weight_decay": 0.0,
        "logging_steps": 1, "report_to": "none", "seed": 3407, "output_dir": str(folder / "outputs"),
    }  # fmt: skip
    return UnslothTrainer(
        model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=64,
        dataset_num_proc=8, args=UnslothTrainingArguments(**{**settings, **given}),
    )  # fmt: skip


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


def write(model: Any, tokenizer: Any) -> str:
    """As the guide does it: in a thread, piece by piece."""
    inputs = tokenizer("The statement", return_tensors="pt").to(model.device)
    streamer = TextIteratorStreamer(tokenizer)
    keywords = {**inputs, "streamer": streamer, "max_new_tokens": 8, "use_cache": True, "do_sample": False}
    thread = Thread(target=model.generate, kwargs=keywords)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 1
    return "".join(pieces)


def test_the_guide_from_loading_to_saving(each_base: Path, documents: list[str], tmp_path: Path, capsys: Any) -> None:
    model, tokenizer = load(each_base)
    FastLanguageModel.for_inference(model)
    assert not model.training
    before = write(model, tokenizer)
    FastLanguageModel.for_training(model)
    model = adapt(model)
    assert "trained in full instead" in capsys.readouterr().err
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    rows = [{"text": text + tokenizer.eos_token} for text in documents[:30]]
    trainer = trainer_of(model, tokenizer, rows, tmp_path)
    statistics = trainer.train()

    assert statistics.metrics["train_runtime"] > 0
    assert statistics.global_step == 8
    losses = [line["loss"] for line in trainer.state.log_history]
    assert statistics.training_loss == pytest.approx(sum(losses) / 8)
    assert losses[-1] < losses[0]
    said = capsys.readouterr().err
    assert "dataset_num_proc=8 has no effect here" in said
    assert "30 of 30 documents ended with '<|endoftext|>'" in said
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items() if tensor.numel())

    FastLanguageModel.for_inference(model)
    assert write(model, tokenizer) != before
    ids = tokenizer(documents[40][:300], return_tensors="pt")["input_ids"][:, :60]
    with torch.no_grad():
        ours = model(input_ids=ids.to(model.device)).logits.float().cpu()
    assert trainer.run_directory is not None
    exported = steep.export(trainer.run_directory, dtype="float32", out=tmp_path / "hf")
    from transformers import AutoModelForCausalLM

    untrained = AutoModelForCausalLM.from_pretrained(each_base)
    merged = AutoModelForCausalLM.from_pretrained(exported.path)
    with torch.no_grad():
        learnt = distance(untrained(input_ids=ids).logits, ours)
    # the notebook's model computes in bf16 where the machine does, and its frozen weights are rounded to it
    near = learnt / (50 if is_bfloat16_supported() else 10_000)
    with torch.no_grad():
        assert distance(merged(input_ids=ids).logits, ours) < near

    model.save_pretrained(tmp_path / "lora")  # peft's own
    from peft import PeftModel

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(each_base), str(tmp_path / "lora"))
    with torch.no_grad():
        assert distance(again(input_ids=ids).logits.float(), ours) < near


def test_a_run_of_a_notebook_is_the_run_of_its_configuration(base: Path, documents: list[str], tmp_path: Path) -> None:
    """The configuration that the notebook's trainer writes, trained by steep itself, gives the same losses."""
    model, tokenizer = load(base)
    rows = [{"text": text} for text in documents[:30]]
    trainer = trainer_of(adapt(model), tokenizer, rows, tmp_path)
    trainer.train()
    assert trainer.run_directory is not None
    import yaml

    mapping = yaml.safe_load((trainer.run_directory / "config.yaml").read_text())
    mapping["run"] |= {"name": "again", "directory": str(tmp_path)}
    steep.train(mapping)
    lines = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[0] == trainer.state.log_history[0]["loss"]  # the adapter starts at zero
    assert losses == pytest.approx([line["loss"] for line in trainer.state.log_history], abs=5e-3)  # A of another seed


def test_training_twice_goes_on_and_gives_each_run_a_folder(base: Path, documents: list[str], tmp_path: Path) -> None:
    model, tokenizer = load(base)
    model = adapt(model)
    rows = [{"text": text} for text in documents[:30]]
    first = trainer_of(model, tokenizer, rows, tmp_path)
    first.train()
    second = trainer_of(model, tokenizer, rows, tmp_path)
    second.train()
    assert [first.run_directory.name, second.run_directory.name] == ["run-1", "run-2"]  # type: ignore[union-attr]
    assert second.state.log_history[0]["loss"] < first.state.log_history[0]["loss"]


def test_bf16_embeddings_and_writing_go_together(base: Path, documents: list[str], tmp_path: Path) -> None:
    """fp32 embeddings beside bf16 layers: a notebook writes outside training, without autocast of its own."""
    model, tokenizer = load(base, dtype=torch.bfloat16)
    model = adapt(model)
    trainer_of(model, tokenizer, [{"text": text} for text in documents[:20]], tmp_path, max_steps=2).train()
    write(FastLanguageModel.for_inference(model), tokenizer)


def test_whole_models_other_datasets_and_held_out_text(base: Path, documents: list[str], tmp_path: Path) -> None:
    model, tokenizer = load(base, full_finetuning=True, load_in_4bit=True)
    (tmp_path / "own.txt").write_text("\n\n".join(documents[:20]), encoding="utf-8")
    trainer = UnslothTrainer(
        model=model, processing_class=tokenizer, train_dataset=str(tmp_path / "own.txt"), eval_dataset=documents[40:44],
        args=UnslothTrainingArguments(max_steps=8, per_device_train_batch_size=2, learning_rate=1e-3, output_dir=str(tmp_path)),
    )  # fmt: skip
    trainer.train()
    summary = json.loads((tmp_path / "run-1" / "summary.json").read_text())
    texts = summary["texts"]["eval_dataset"]
    assert texts["after"]["bits_per_byte"] < texts["before"]["bits_per_byte"]


def test_a_step_holds_as_many_documents_as_were_asked_for(base: Path, tmp_path: Path, capsys: Any) -> None:
    """60 rows in batches of 2 x 2 are 15 steps where each is a padded row; so they are here, where rows are packed."""
    model, tokenizer = load(base)
    model = adapt(model)
    rows = [{"text": "The statement is an expression." + " a" * (number % 7)} for number in range(60)]

    def steps(dataset: Any, **given: Any) -> int:
        settings = {"max_steps": -1, "num_train_epochs": 1, "output_dir": str(tmp_path / "one"), **given}
        config = trainer_of(model, tokenizer, dataset, tmp_path, **settings).configuration()
        assert config.data.sequence_length <= 64
        tokens = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows)
        return round(tokens / config.data.sequence_length / config.train.global_batch_size)

    assert steps(rows) in (14, 15, 16)
    assert "4 documents per step are about" in capsys.readouterr().err
    assert steps(rows, packing=True) < 5
    (tmp_path / "own.txt").write_text("text", encoding="utf-8")
    assert steps(str(tmp_path / "own.txt")) < 5
    assert "batch sizes count sequences of 64 tokens" in capsys.readouterr().err


def test_longer_than_the_model_is_scaled_linearly_and_said(base: Path, capsys: Any) -> None:
    model, _ = load(base, max_seq_length=256)
    assert "scaled linearly" in capsys.readouterr().err
    assert model.config.max_position_embeddings == 256


def test_errors_come_before_training(base: Path, documents: list[str], tmp_path: Path) -> None:
    model, tokenizer = load(base)
    rows = [{"text": text} for text in documents[:5]]
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        trainer_of(model, tokenizer, rows, tmp_path)
    with pytest.raises(ConfigError, match="no argument 'lora_alfa'. Did you mean 'lora_alpha'"):
        FastLanguageModel.get_peft_model(model, lora_alfa=2)
    with pytest.raises(ConfigError, match="fast_inference=True is not supported"):
        load(base, fast_inference=True)
    with pytest.raises(ConfigError, match="did not come from steep.unsloth"):
        FastLanguageModel.get_peft_model(build_fresh(LLAMA, None, seed=0))
    model = adapt(model)
    with pytest.raises(ConfigError, match="has an adapter already"):
        adapt(model)
    with pytest.raises(DataError, match=r"row 0 has no field 'text' \(it has: story\)"):
        trainer_of(model, tokenizer, [{"story": "x"}], tmp_path).train()
    with pytest.raises(ConfigError, match="not trained yet"):
        model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match="New tokens need embeddings"):
        trainer_of(model, tokenizer, rows, tmp_path)


def test_the_memory_of_a_notebook_is_drawn_part_by_part() -> None:
    figure = memory_plot({"model": 4.78e9, "forward pass": 0.25e9, "adapter": 1.14e9, "training": 3.68e9}, 9.85e9)
    [axes] = figure.axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [4.78e9, 0.25e9, 1.14e9, 3.68e9, 9.85e9]
    assert math.isclose(axes.patches[3].get_x() + widths[3], 9.85e9)
