"""Adapters: names, what is trained, what is refused, resume, plans and quantized bases."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import steep
from steep.config.load import load_run_config
from steep.core.errors import ConfigError, ModelError
from steep.estimate.memory import saved_bytes
from steep.models.adapters import adapter_tensors, add_adapter, capacity_line, plan_adapter
from steep.models.config import AdapterConfig, ModelConfig
from steep.models.load import load_model
from steep.models.quantize import linear_layers, plan_quantized, quantize, quantized_line
from steep.optim.config import OptimizerConfig
from steep.optim.param_groups import build_param_groups
from steep.training.loop import train
from support import LLAMA, losses, run_mapping

BOTH = ["embed_tokens", "lm_head"]
WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": False}


def small(tied: bool = True) -> Any:
    """A random llama of two layers."""
    return load_model(ModelConfig(config={**LLAMA, "tie_word_embeddings": tied}), seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path) -> dict[bool, Path]:
    """The same as folders, tied and not, with a tokenizer."""
    from transformers import AutoTokenizer

    folders = {}
    for tied in (True, False):
        folders[tied] = tmp_path_factory.mktemp("base")
        small(tied).save_pretrained(folders[tied])
        AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folders[tied])
    return folders


@pytest.fixture
def mapping(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path, base: dict[bool, Path]
) -> dict[str, Any]:
    """An adapter run on the tied base."""
    changed = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base[True])})
    changed["tokenizer"] = {}
    return {**changed, "adapter": {"rank": 4, "modules_to_save": BOTH}}


def run(mapping: dict[str, Any], **arguments: Any) -> tuple[Any, str]:
    stream = io.StringIO()
    result = train(load_run_config(mapping=mapping), stream=stream, **arguments)
    return result, stream.getvalue()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [{}, {"type": "dora", "bias": "all"}, {"rslora": True, "bias": "lora_only"}])
def test_tensors_have_the_names_that_peft_saves_them_under(tied: bool, settings: dict[str, Any]) -> None:
    from peft import get_peft_model_state_dict

    model = small(tied)
    add_adapter(model, AdapterConfig(rank=4, modules_to_save=BOTH, **settings), print, base=None, seed=0)
    ours = adapter_tensors(model)
    theirs = get_peft_model_state_dict(model, adapter_name="default")
    assert {name.removeprefix("base_model.model.") for name in ours} == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[f"base_model.model.{name}"], tensor)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_the_update_is_scaled_by_the_rank_or_its_root(rslora: bool, scale: float) -> None:
    model = small()
    config = AdapterConfig(rank=4, alpha=16, rslora=rslora, targets=["q_proj"])
    lines: list[str] = []
    add_adapter(model, config, lines.append, base=None, seed=0)
    [line] = lines
    assert model.model.layers[0].self_attn.q_proj.scaling["default"] == scale
    assert f"scale {scale:.3g}, on 2 linear layers" in line


def test_embeddings_among_the_targets_are_trained_in_full_and_said() -> None:
    model = small()
    lines: list[str] = []
    add_adapter(model, AdapterConfig(rank=4, targets=["q_proj", "lm_head"]), lines.append, base=None, seed=0)
    assert "lm_head in targets: trained in full instead" in lines[0]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "model.embed_tokens.modules_to_save.default.weight" in names
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("lm_head.lora" in name or "embed_tokens.lora" in name for name in names)


def test_the_seed_draws_the_adapter_and_torch_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    tensors = []
    for seed in (3, 3, 4):
        model = small()
        add_adapter(model, AdapterConfig(rank=4), print, base=None, seed=seed)
        tensors.append(model.model.layers[0].self_attn.q_proj.lora_A["default"].weight)
    assert torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[0], tensors[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_trained_is_fp32_on_a_bf16_base() -> None:
    model = load_model(ModelConfig(config=LLAMA), dtype=torch.bfloat16)
    add_adapter(model, AdapterConfig(rank=4, modules_to_save=["embed_tokens"]), print, base=None, seed=0)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters() if parameter.numel()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_lora_plus_groups_are_those_of_peft() -> None:
    from peft import get_peft_model_state_dict
    from peft.optimizers import create_loraplus_optimizer

    model = small(tied=False)
    add_adapter(model, AdapterConfig(rank=4, lora_plus_ratio=16), print, base=None, seed=0)
    groups = {g["name"]: g for g in build_param_groups(model, OptimizerConfig(learning_rate=1e-4, weight_decay=0.0))}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    ours = {id(p): group["lr"] for group in groups.values() for _, p in group["params"]}
    assert len(ours) == len(get_peft_model_state_dict(model, adapter_name="default"))
    assert ours == pytest.approx(rates)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ["q_prj"]}, "q_prj is not a linear layer.*down_proj"),
        ({"modules_to_save": ["embeddings"]}, "embeddings is not a module.*embed_tokens, lm_head"),
        ({"targets": ["lm_head"]}, "names no linear layer"),
    ],
)
def test_names_that_are_not_there_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapter(small(), AdapterConfig(**config), print, base=None, seed=0)


def test_a_model_that_peft_cannot_adapt_is_refused() -> None:
    from steep.models.gpt2 import build_gpt2_model

    model = build_gpt2_model(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ModelError, match="not a transformers model"):
        add_adapter(model, AdapterConfig(), print, base=None, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"quantize": "nf4"}, "adapter": None}, "nf4 weights cannot be trained"),
        ({"model": {"freeze": "embeddings"}}, "an adapter freezes the whole model"),
        ({"model": {"quantize": "int8"}, "adapter": {"type": "dora"}}, "dora needs the norms"),
    ],
)
def test_what_cannot_go_together_is_refused(mapping: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    changed = {**mapping, **changes, "model": {**mapping["model"], **changes["model"]}}
    with pytest.raises(ConfigError, match=message):
        load_run_config(mapping=changed)


def test_a_run_with_an_adapter_resumes_to_the_same_bits(mapping: dict[str, Any]) -> None:
    whole, text = run(mapping)
    assert "embed_tokens trained in full as one tensor" in text
    assert "embeddings" in text
    mapping["run"]["name"] = "parts"
    mapping["train"]["max_seconds"] = 0
    for _ in range(2):
        run(mapping)
    mapping["train"]["max_seconds"] = None
    parts, _ = run(mapping)
    assert losses(parts.run_directory) == losses(whole.run_directory)
    files = [r.run_directory / "checkpoints/epoch_0_step_6/model/rank_00000.safetensors" for r in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    names = set(json.loads((files[0].parent / "shards.json").read_text())["tensors"])
    assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in names)  # no base weights


@pytest.mark.parametrize("method", ["nf4", "int8", "torchao_int8"])
def test_a_run_on_a_quantized_base(mapping: dict[str, Any], method: str) -> None:
    pytest.importorskip(
        "torchao" if method == "torchao_int8" else "bitsandbytes", reason="the extra quant is not installed"
    )
    mapping["model"]["quantize"] = method
    mapping["train"]["steps"] = 20
    mapping["optimizer"] |= {"learning_rate": 1e-2, "embedding_learning_rate": 1e-2}
    mapping["evaluate"] |= {"every_steps": 5}  # evaluation between the steps must leave the weights trainable
    result, _ = run(mapping)
    trained = [loss for _, loss, _ in losses(result.run_directory)]
    assert trained[-1] < trained[0] - 0.3
    assert result.after["heldout"]["nats_per_token"] < result.before["heldout"]["nats_per_token"]


def scale_bytes(model: Any) -> int:
    """Scales and tables of bitsandbytes' layers, which are neither parameters nor buffers."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors = (getattr(part, "absmax", None), getattr(part, "code", None))
            total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        scales = getattr(parameter, "SCB", None)
        total += scales.numel() * scales.element_size() if isinstance(scales, torch.Tensor) else 0
    return total


def test_four_bits_take_less_than_a_third_of_bf16() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    sizes = {**LLAMA, "hidden_size": 256, "intermediate_size": 512}
    model = load_model(ModelConfig(config=sizes), dtype=torch.bfloat16)
    plain = sum(layer.weight.numel() * 2 for _, _, layer in linear_layers(model))
    outside = sum(p.numel() * 2 for p in model.parameters()) - plain
    assert len(linear_layers(model)) == 14
    quantize(model, "nf4", torch.bfloat16, "cpu")
    assert not linear_layers(model)
    quantized = sum(p.numel() * p.element_size() for p in model.parameters()) - outside + scale_bytes(model)
    assert quantized < 0.3 * plain


@pytest.mark.parametrize("method", ["nf4", "int8", "torchao_int8"])
def test_the_plan_says_what_a_run_says_of_what_is_not_quantized(
    method: str, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    pytest.importorskip(
        "torchao" if method == "torchao_int8" else "bitsandbytes", reason="the extra quant is not there"
    )
    model: Any = load_model(ModelConfig(config=WIDE), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    quantize(model, method, torch.bfloat16, "cpu")
    said = quantized_line(model, method)
    assert said.startswith(f"model.quantize: {method}; not quantized: model.embed_tokens.weight, lm_head.weight (")
    mapping = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, adapter={"rank": 4},
        model={"pretrained": str(tmp_path / "base"), "quantize": method},
    )  # fmt: skip
    assert f"  {said}\n" in steep.plan(mapping).to_text()


def kept_by_attributes(output: torch.Tensor) -> int:
    """Bytes of the inputs that bitsandbytes' 8-bit layers keep as attributes of the graph, which no hook sees."""
    waiting, seen, storages = [output.grad_fn], set(), {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(tensor := getattr(node, "A", None), torch.Tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("method", ["nf4", "int8", "torchao_int8"])
def test_quantized_layers_answer_in_the_dtype_of_autocast(method: str) -> None:
    """Behind embeddings that are trained, in fp32, as a plain linear layer would; else activations take twice the memory."""
    pytest.importorskip(
        "torchao" if method == "torchao_int8" else "bitsandbytes", reason="the extra quant is not there"
    )
    model, planned = (load_model(ModelConfig(config=WIDE), dtype=torch.bfloat16) for _ in range(2))
    config = AdapterConfig(rank=4, modules_to_save=BOTH)
    quantize(model, method, torch.bfloat16, "cpu")
    add_adapter(model, config, print, base=None, seed=0)
    dtypes: list[torch.dtype] = []
    for _, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda module, arguments, output: dtypes.append(output.dtype))
    plan_quantized(planned, method)
    plan_adapter(planned, config)
    ids = torch.arange(128).view(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [each.base_model(input_ids=ids, use_cache=False)[0] for each in (model, planned)]
        kept, expected = (
            saved_bytes(each, lambda each=each: each.base_model(input_ids=ids, use_cache=False)[0])
            for each in (model, planned)
        )
    assert dtypes == [torch.bfloat16] * 28
    assert kept + kept_by_attributes(outputs[0]) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": BOTH}, {"type": "dora", "targets": ["q_proj", "up_proj"]}]
)
@pytest.mark.parametrize("method", [None, "nf4"])
def test_the_plan_knows_what_is_trained_and_what_weights_take(
    tied: bool, settings: dict[str, Any], method: str | None
) -> None:
    if method is not None:
        pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    config = AdapterConfig(rank=4, **settings)
    real, planned = small(tied), small(tied)
    if method is not None:
        quantize(real, method, torch.float32, "cpu")
        plan_quantized(planned, method)
    add_adapter(real, config, print, base=None, seed=0)
    plan_adapter(planned, config)

    def size(model: Any) -> tuple[int, int]:
        tensors = [*model.parameters(), *model.buffers()]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return trained, sum(t.numel() * t.element_size() for t in tensors) + scale_bytes(model)

    assert size(planned)[0] == size(real)[0]
    assert size(planned)[1] == pytest.approx(size(real)[1], rel=0.02)


def test_text_is_weighed_against_the_adapter() -> None:
    assert capacity_line(4_884_480, 9_000_000).endswith("enough room")
    line = capacity_line(4_884_480, 10_000_000)
    assert "4.88M trained parameters hold about 9.77M bits, 10M tokens of new text teach at most about 10M" in line
    assert line.endswith("a higher adapter.rank, or the whole model (remove adapter)")


def test_plan_and_run_say_whether_the_adapter_has_room(
    base: dict[bool, Path], tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The run's own tokens where it takes less than all of its text; replay does not count."""
    mapping = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base[True])}, adapter={"rank": 2}
    )
    mapping["data"]["train"].append({"path": str(corpus_directory), "role": "replay", "weight": 0.5, "name": "again"})
    mapping["data"]["train"][0]["weight"] = 0.5
    planned = steep.plan(mapping)
    assert planned.data.new_text_tokens(10**9) == planned.data.order.sources[0].num_tokens
    line = capacity_line(planned.structure.trainable, 6 * 4 * 64)
    assert line in planned.to_text()
    steep.train(mapping)
    assert line in capsys.readouterr().out
