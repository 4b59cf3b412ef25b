"""A model with a vision tower is trained on text and stays whole: its tower bit for bit, and its processor."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import steep
from steep.config.load import load_run_config
from steep.models.composite import PROCESSOR_FILES
from steep.training.loop import train
from support import losses, run_mapping

TEXT = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
          "patch_size": 8}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 8,
}
QWEN_IDS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8}, "vision_config": VISION,
        "mm_tokens_per_image": 4, "image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT}, "image_token_index": 500,
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": {**QWEN_VISION, "window_size": 32}, **QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": ROPE}, **QWEN_IDS,
        "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT}, "image_token_index": 500,
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT}, "image_token_id": 500, "image_seq_length": 4,
        "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
    },
    **{
        name: {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "image_token_id": 500, "scale_factor": 2}
        for name in ("idefics3", "smolvlm")
    },
}  # fmt: skip
MARKED = [pytest.param(name, marks=[] if name == "gemma3" else [pytest.mark.slow]) for name in FAMILIES]


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer_directory: Path) -> Path:
    """A tiny random model of the family, with its tokenizer and the files of a processor."""
    torch.manual_seed(0)
    name = request.getfixturevalue("name")
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **FAMILIES[name]))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(tmp_path / "base")
    for file in PROCESSOR_FILES:
        (tmp_path / "base" / file).write_text(json.dumps({"file": file}))
    return tmp_path / "base"


def whole(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.mark.parametrize("adapter", [pytest.param(None), pytest.param({"rank": 2}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MARKED)
def test_the_whole_model_is_trained_on_text_resumed_and_exported(
    name: str, base: Path, adapter: dict[str, Any] | None, tmp_path: Path, corpus_directory: Path,
    tiny_tokenizer_directory: Path,
) -> None:  # fmt: skip
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base)})
    mapping |= {"tokenizer": {}, "adapter": adapter, "train": {**mapping["train"], "steps": 2}}
    said = io.StringIO()
    run = train(load_run_config(mapping=mapping), stream=said).run_directory
    frozen = [line for line in said.getvalue().splitlines() if line.startswith("frozen: ")]
    assert len(frozen) == 1
    assert "text trains only the language model" in frozen[0]
    assert "text trains only the language model" in str(steep.plan(mapping))
    mapping["train"]["steps"] = 3
    train(load_run_config(mapping=mapping), stream=io.StringIO())
    assert len(losses(run)) == 3
    folder = run / "checkpoints" / "epoch_0_step_3" / "model" / "consolidated"
    steep.export(run, to="hf", out=tmp_path / "out", dtype="float32")
    for file in PROCESSOR_FILES:
        assert (
            json.loads((folder / file).read_text())
            == json.loads((tmp_path / "out" / file).read_text())
            == {"file": file}
        )
    before, after = whole(base), whole(tmp_path / "out")
    assert type(before) is type(after)
    old, new = before.state_dict(), after.state_dict()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed
    assert all(
        ".vision" not in key and ".visual" not in key and "projector" not in key and "connector" not in key
        for key in changed
    )
    if adapter is None:
        ids = torch.arange(30).unsqueeze(0)
        with torch.no_grad():
            assert torch.equal(whole(folder)(input_ids=ids).logits, after(input_ids=ids).logits)
    if name == "gemma3":
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is type(before)
