"""Context extension: what is written, what is refused, and that transformers reloads the same model, at a resume too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steep.config.load import load_run_config
from steep.core.errors import ModelError
from steep.estimate.run_plan import plan
from steep.models.config import ModelConfig, RopeConfig
from steep.models.fresh import build_fresh
from steep.models.layers import max_positions
from steep.models.load import load_model
from steep.models.reference import resolve_reference
from steep.training.loop import train
from support import LLAMA, losses, run_mapping


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_transformers_reloads_a_pretrained_model_with_its_scaling(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    build_fresh(LLAMA, None, seed=0).save_pretrained(tmp_path / "base")
    rope = RopeConfig(type=kind, length=512)
    model = load_model(ModelConfig(pretrained=str(tmp_path / "base"), rope=rope)).eval()
    model.save_pretrained(tmp_path / "long")
    written = json.loads((tmp_path / "long" / "config.json").read_text())
    assert written["max_position_embeddings"] == 512
    assert written["rope_parameters"]["rope_type"] == kind
    assert written["rope_parameters"]["factor"] == 4
    assert max_positions(model) == 512
    ids = torch.arange(300)[None]
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "long").eval()(ids).logits, logits)
        assert not torch.equal(load_model(ModelConfig(pretrained=str(tmp_path / "base"))).eval()(ids).logits, logits)


def test_dynamic_scaling_keeps_short_texts_and_the_written_positions(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = build_fresh(LLAMA, None, seed=0).eval()
    plain.save_pretrained(tmp_path / "base")
    rope = RopeConfig(type="dynamic", factor=4)
    model = load_model(ModelConfig(pretrained=str(tmp_path / "base"), rope=rope)).eval()
    model.save_pretrained(tmp_path / "long")
    assert max_positions(model) == 512
    assert max_positions(AutoModelForCausalLM.from_pretrained(tmp_path / "long")) == 512
    short, long = torch.arange(100)[None], torch.arange(300)[None]
    with torch.no_grad():
        assert torch.equal(model(short).logits, plain(short).logits)
        assert not torch.allclose(model(long).logits, plain(long).logits, atol=1e-5)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "long").eval()
        assert torch.equal(reloaded(long).logits, model(long).logits)


def test_an_adapter_trained_with_more_positions_is_merged_with_them(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    import steep

    build_fresh(LLAMA, None, seed=0).save_pretrained(tmp_path / "base")
    model = {"pretrained": str(tmp_path / "base"), "rope": {"type": "linear", "length": 256}}
    changes = {"data": {"sequence_length": 256}, "train": {"steps": 3, "global_batch_size": 2}}
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model=model, **changes)
    mapping["adapter"] = {"rank": 4}
    result = train(load_run_config(mapping=mapping))
    scored = steep.evaluate(result.run_directory, against="base", precision="fp32")
    assert scored.scores[0].nats_per_token == pytest.approx(result.after["heldout"]["nats_per_token"], abs=1e-5)
    assert scored.against_scores is not None
    base = result.before["heldout"]["nats_per_token"]
    assert scored.against_scores[0].nats_per_token == pytest.approx(base, abs=1e-5)


def test_what_cannot_be_extended_is_refused() -> None:
    rope = RopeConfig(type="yarn", factor=2)
    with pytest.raises(ModelError, match="no rotary positions"):
        build_fresh(
            {"model_type": "gpt2", "vocab_size": 64, "n_embd": 8, "n_head": 2, "n_layer": 1}, None, 0, rope=rope
        )
    with pytest.raises(ModelError, match="extends nothing"):
        build_fresh(LLAMA, None, 0, rope=RopeConfig(type="yarn", length=128))
    scaled = build_fresh(LLAMA, None, 0, rope=rope).config.to_dict()["rope_parameters"]
    with pytest.raises(ModelError, match="already has scaled rotary positions"):
        build_fresh({**LLAMA, "rope_parameters": scaled}, None, 0, rope=rope)


def test_a_run_beyond_the_positions_is_planned_trained_and_resumed(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    changes = {"data": {"sequence_length": 256}, "train": {"steps": 4, "global_batch_size": 2}}
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, **changes)
    with pytest.raises(ModelError, match=r"extend it: model.rope: \{type: yarn, length: 256\}"):
        train(load_run_config(mapping=mapping))

    mapping["model"] = {"config": LLAMA, "rope": {"type": "yarn", "length": 256}}
    mapping["run"]["name"] = "whole"
    plan(load_run_config(mapping=mapping))
    whole = train(load_run_config(mapping=mapping)).run_directory
    mapping["run"]["name"], mapping["train"]["max_seconds"] = "parts", 0
    train(load_run_config(mapping=mapping))
    del mapping["train"]["max_seconds"]
    parts = train(load_run_config(mapping=mapping), resume=True).run_directory
    assert losses(parts) == losses(whole)
    written = resolve_reference(str(parts))
    assert written is not None
    config = json.loads((written / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert config["rope_parameters"]["factor"] == 2
