"""What was trained as an adapter is what is evaluated, exported and loaded by peft and transformers.

The case that turns a loss of 1.4 into 12.4 elsewhere (embeddings and head of a model that ties them) is among these."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import steep
from steep.config.load import load_run_config
from steep.evaluation.loaded_model import note_adapter_merge
from steep.models.config import ModelConfig
from steep.models.load import load_model
from steep.training.loop import train
from support import LLAMA, run_mapping


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path,
    tiny_tokenizer_directory: Path,
) -> Any:  # fmt: skip
    """A run that has trained an adapter and all embeddings so far that the loss has fallen by a lot."""
    folder = tmp_path_factory.mktemp("adapter")
    load_model(ModelConfig(config={**LLAMA, "tie_word_embeddings": request.param}), seed=1).save_pretrained(
        folder / "base"
    )
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folder / "base")
    mapping = run_mapping(
        folder, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(folder / "base")}
    )
    mapping["tokenizer"] = {}
    mapping["adapter"] = {"rank": 8, "modules_to_save": ["embed_tokens", "lm_head"]}
    mapping["train"]["steps"] = 30
    mapping["optimizer"] = {"learning_rate": 1e-2, "embedding_learning_rate": 1e-2}
    return train(load_run_config(mapping=mapping), stream=io.StringIO()), request.param


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).unsqueeze(0), use_cache=False).logits


def test_the_merged_model_scores_what_training_scored(trained: Any) -> None:
    result, _ = trained
    assert result.after["heldout"]["nats_per_token"] < result.before["heldout"]["nats_per_token"] - 0.5
    scored = steep.evaluate(result.run_directory, precision="fp32")
    assert scored.scores[0].nats_per_token == pytest.approx(result.after["heldout"]["nats_per_token"], abs=1e-5)


def test_the_export_is_the_trained_model_and_as_tied_as_before(trained: Any, tmp_path: Path) -> None:
    result, tied = trained
    exported = steep.export(result.run_directory, to="hf", out=tmp_path / "hf", dtype="float32")
    assert exported.loss_change == pytest.approx(0, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    ours = logits(load_model(ModelConfig(pretrained=str(result.run_directory))))
    assert torch.allclose(logits(model), ours, atol=1e-5)


def test_the_adapter_alone_is_exported_in_the_layout_of_peft(
    trained: Any, corpus_directory: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from steep.core.errors import ModelError
    from steep.exporters.format import Options
    from steep.exporters.run import ask_trained, open_task

    result, _ = trained
    exported = steep.export(result.run_directory, to="adapter", out=tmp_path / "adapter")
    assert "peft" in exported.verified_with
    assert exported.parities[0].greedy_tokens_equal == exported.parities[0].greedy_tokens
    again = steep.evaluate(exported.path, {"page": str(min(corpus_directory.glob("*.txt")))}, tokens=500)
    assert again.scores[0].nats_per_token > 0
    with open_task(str(result.run_directory), "adapter", Options()) as (exporter, task):
        ask_trained(task)
        expected = exporter.write(task, tmp_path / "changed")
        file = tmp_path / "changed" / "adapter_model.safetensors"
        save_file({k: v * 1.5 for k, v in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(ModelError, match="is not the trained model"):
            exporter.verify(task, tmp_path / "changed", expected)


def test_peft_loads_the_checkpoint_as_it_is(trained: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    result, _ = trained
    folder = next(Path(result.run_directory).glob("checkpoints/*_step_30")) / "model" / "consolidated"
    base = AutoModelForCausalLM.from_pretrained(Path(result.run_directory).parents[1] / "base")
    theirs = logits(PeftModel.from_pretrained(base, str(folder)))
    ours = logits(load_model(ModelConfig(pretrained=str(result.run_directory))))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), theirs, atol=1e-4)


def test_what_merging_loses_is_said(trained: Any, tmp_path: Path) -> None:
    """The base of an adapter that is a .gguf file, or was quantized in training, is not what was trained on."""
    import json
    import shutil

    result, _ = trained
    run = Path(shutil.copytree(result.run_directory, tmp_path / "run"))
    folder = newest_folder(run)
    said: list[str] = []
    note_adapter_merge(folder, run, said.append)
    assert said == []
    config = (run / "config.yaml").read_text()
    assert "quantize: null" in config
    (run / "config.yaml").write_text(config.replace("quantize: null", "quantize: nf4"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "model.q4.gguf"}))
    note_adapter_merge(folder, run, said.append)
    trained_on, dequantized = said
    assert "in nf4; it is merged into the unquantized weights" in trained_on
    assert "model.q4.gguf, dequantized" in dequantized


def newest_folder(run: Path) -> Path:
    name = (run / "checkpoints" / "LATEST").read_text().strip()
    return run / "checkpoints" / name / "model" / "consolidated"
