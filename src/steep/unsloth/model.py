"""FastLanguageModel: load, adapt, switch between training and writing, save. Models are transformers', adapters peft's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from steep.checkpoint.load import verified_reference
from steep.core.errors import ConfigError
from steep.models.adapters import add_adapter
from steep.models.config import AdapterConfig, ModelConfig, RopeConfig
from steep.models.hf_config import pretrained_config
from steep.models.layers import max_positions
from steep.models.load import load_model
from steep.models.reference import lasting_reference
from steep.runtime.device import autocast, choose_device, choose_precision, frozen_dtype, parameter_dtype
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.unsloth.cpu_fallback import encodings_stay_here
from steep.unsloth.translate import check_keys, ignored_lines, refuse, say

LOAD_MEANS_NOTHING = {
    "token": "a gated model is fetched with the token of huggingface_hub's own login",
    "device_map": "the model goes to the GPU if there is one",
    "trust_remote_code": "code from a hub is never run",
    "fix_tokenizer": "the tokenizer is used as it is",
    "use_exact_model_name": "names are always taken as they are",
    "disable_log_stats": "",
    "random_state": "loading draws no numbers",
    "attn_implementation": "attention is computed document by document where the model allows it",
    "use_gradient_checkpointing": "get_peft_model is where it is chosen",
    "gpu_memory_utilization": "there is no vLLM engine inside the process",
    "max_lora_rank": "there is no vLLM engine inside the process",
}
LOAD_CANNOT = {
    "load_in_fp8": "load_in_4bit and load_in_8bit are there",
    "fast_inference": "writing is transformers' own generate; vLLM reads what steep exports",
    "resize_model_vocab": "add tokens with `vocabulary` in a steep configuration",
}
LOAD_KEYS = (
    "model_name",
    "max_seq_length",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "load_in_16bit",
    "full_finetuning",
    "rope_scaling",
    "revision",
)

ADAPT_MEANS_NOTHING = {
    "max_seq_length": "the length given to from_pretrained holds",
    "temporary_location": "nothing is swapped to disk",
    "ensure_weight_tying": "tied embeddings always stay one tensor",
    "task_type": "it is always CAUSAL_LM",
}
ADAPT_CANNOT = {
    "loftq_config": "adapters start at zero, so that the model starts as its base",
    "layers_to_transform": "name the layers' modules in target_modules instead",
    "layers_pattern": "name the layers' modules in target_modules instead",
    "rank_pattern": "all adapters have one rank",
    "alpha_pattern": "all adapters have one scale",
    "init_lora_weights": "adapters start at zero, so that the model starts as its base",
    "use_qgalore": "optimizer.name galore is there, without adapters",
}
ADAPT_KEYS = (
    "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "modules_to_save",
    "use_gradient_checkpointing", "random_state",
)  # fmt: skip


@dataclass
class NotebookState:
    """What is known of a model that came through this door; kept as an attribute of the transformers model."""

    config: ModelConfig
    tokenizer: Any
    vocabulary_size: int
    """Tokens of the tokenizer as it was loaded."""
    max_seq_length: int
    precision: str
    device: torch.device
    full_finetuning: bool
    adapter: AdapterConfig | None = None
    checkpointing: Any = False
    run_directory: Path | None = None
    """Of the newest training."""


def is_bfloat16_supported() -> bool:
    """Whether the device that would train, the GPU if there is one, computes bf16 in hardware (a T4 only emulates it)."""
    return choose_precision("auto", choose_device("auto").type) != "fp32"


def inner(model: Any) -> Any:
    """The transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def notebook_state(model: Any) -> NotebookState:
    """Raises ConfigError for a model that was loaded elsewhere."""
    found = getattr(inner(model), "steep_notebook", None)
    if not isinstance(found, NotebookState):
        raise ConfigError(
            f"this {type(model).__name__} did not come from steep.unsloth's FastLanguageModel.from_pretrained"
        )
    return found


class FastLanguageModel:
    """The calls of Unsloth's class of this name."""

    @staticmethod
    def from_pretrained(
        model_name: str, max_seq_length: int = 2048, dtype: Any = None, load_in_4bit: bool = True, **given: Any
    ) -> tuple[Any, Any]:
        """(model, tokenizer): a transformers model on the GPU if there is one, and its tokenizer.

        model_name: folder, .gguf file, steep run or hub id. max_seq_length: tokens; over the model's positions they are scaled
        linearly, with a line. dtype: torch's, or None: bf16 where the device has it, else fp32. load_in_4bit: linear layers as
        NF4 (extra `quant`). Raises SteepError.
        """
        call = "FastLanguageModel.from_pretrained"
        check_keys(call, given, [*LOAD_KEYS, *LOAD_MEANS_NOTHING, *LOAD_CANNOT])
        refuse(call, given, LOAD_CANNOT)
        for line in ignored_lines(call, given, LOAD_MEANS_NOTHING):
            say(line)
        full = bool(given.get("full_finetuning"))
        eight = bool(given.get("load_in_8bit"))
        load_in_4bit = load_in_4bit and not given.get("load_in_16bit")
        if full and (load_in_4bit or eight):
            say("full_finetuning: weights in 4 or 8 bits cannot be trained, so they are loaded whole")
        device = choose_device("auto")
        precision = _precision(dtype, device)
        quantize: Any = None if full else "int8" if eight else "nf4" if load_in_4bit else None
        config = ModelConfig(pretrained=str(model_name), revision=given.get("revision"), quantize=quantize)
        config = config.model_copy(update={"rope": _rope(config, given.get("rope_scaling"), max_seq_length)})
        model: Any = load_model(
            config, dtype=parameter_dtype(precision) if full else frozen_dtype(precision), device=device
        )
        tokenizer = encodings_stay_here(load_hf_tokenizer(str(model_name), given.get("revision")))
        model.steep_notebook = NotebookState(config, tokenizer, len(tokenizer), max_seq_length, precision, device, full)
        _write_under_autocast(model, device, precision)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any, r: int = 16, target_modules: Any = "all-linear", lora_alpha: float = 16, **given: Any
    ) -> Any:
        """`model` with an adapter, wrapped by peft; the same weights, not a copy.

        Embeddings and output head in target_modules are trained in full, with a line. Raises ConfigError.
        """
        call = "FastLanguageModel.get_peft_model"
        check_keys(call, given, [*ADAPT_KEYS, *ADAPT_MEANS_NOTHING, *ADAPT_CANNOT])
        refuse(call, given, ADAPT_CANNOT)
        for line in ignored_lines(call, given, ADAPT_MEANS_NOTHING):
            say(line)
        notebook = notebook_state(model)
        if notebook.adapter is not None:
            raise ConfigError("this model has an adapter already; load it anew for another one")
        targets: Any = target_modules if isinstance(target_modules, str) else list(target_modules)
        notebook.adapter = AdapterConfig(
            type="dora" if given.get("use_dora") else "lora",
            rank=r,
            alpha=lora_alpha,
            rslora=bool(given.get("use_rslora")),
            dropout=given.get("lora_dropout", 0.0),
            bias=given.get("bias", "none"),
            targets=targets,
            modules_to_save=list(given.get("modules_to_save") or []),
        )
        notebook.checkpointing = _checkpointing(given.get("use_gradient_checkpointing", "unsloth"))
        # of a run the folder that transformers loads, as training writes it: peft knows no run
        base = verified_reference(str(notebook.config.pretrained))
        adapted = add_adapter(
            model, notebook.adapter, say, base=lasting_reference(base), seed=given.get("random_state", 3407)
        )
        for name, method in (("save_pretrained_merged", save_merged), ("save_pretrained_gguf", save_gguf)):
            setattr(adapted, name, MethodType(method, adapted))
        return adapted

    @staticmethod
    def for_inference(model: Any) -> Any:
        """The model, ready to write: dropout off, keys and values cached."""
        inner(model).config.use_cache = True
        model.eval()
        return model

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: Any = None) -> Any:
        """The model, ready to train."""
        if use_gradient_checkpointing is not None:
            notebook_state(model).checkpointing = _checkpointing(use_gradient_checkpointing)
        model.train()
        return model


def _precision(dtype: Any, device: torch.device) -> str:
    name = str(dtype).removeprefix("torch.")
    if name in ("None", "float16"):
        if name == "float16":
            say("dtype float16: steep trains in bf16 where the device has it, else in fp32")
        return choose_precision("auto", device.type)
    if name not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype={dtype!r}: give torch.bfloat16, torch.float32 or None")
    return {"bfloat16": "mixed_bf16", "float32": "fp32"}[name]


def _rope(config: ModelConfig, scaling: Any, length: int) -> RopeConfig | None:
    """The scaling asked for, or a linear one where the model has fewer positions than wanted: what Unsloth does."""
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type"))
        return RopeConfig(type=kind, factor=scaling.get("factor"))
    assert config.pretrained is not None
    positions = max_positions(pretrained_config(config.pretrained, config.revision))
    if positions is None or length <= positions:
        return None
    say(f"max_seq_length {length:,} is more than the model's {positions:,} positions: they are scaled linearly")
    return RopeConfig(type="linear", length=length)


def _checkpointing(value: Any) -> Any:
    """`unsloth` holds the kept inputs of layers in host memory; True and False are steep's own."""
    return {"mode": "full", "offload": True} if value == "unsloth" else bool(value)


def _write_under_autocast(model: Any, device: torch.device, precision: str) -> None:
    """Let a notebook call the model outside training: fp32 embeddings beside bf16 layers need autocast. This instance only."""
    if precision != "mixed_bf16":
        return
    own = type(model).forward

    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with autocast(device, precision):
            return own(self, *arguments, **keywords)

    model.forward = MethodType(forward, model)


def trained_run(model: Any) -> Path:
    """The run that trained `model`. Raises ConfigError before it was trained."""
    found = notebook_state(model).run_directory
    if found is None:
        raise ConfigError("this model was not trained yet: call trainer.train() first")
    return found


def save_merged(
    model: Any, save_directory: str, tokenizer: Any = None, save_method: str = "merged_16bit", **given: Any
) -> Any:
    """A folder with the adapter added to the weights, verified by transformers in a new process; `lora`: the adapter alone."""
    import steep

    check_keys("save_pretrained_merged", given, ["max_shard_size"])
    methods: dict[str, dict[str, Any]] = {
        "merged_16bit": {"to": "hf", "dtype": "bfloat16"},
        "merged_4bit": {"to": "hf", "quantize": "nf4"},
        "lora": {"to": "adapter"},
    }
    if save_method not in methods:
        raise ConfigError(f"save_method={save_method!r} is none of {', '.join(methods)}")
    return steep.export(trained_run(model), out=save_directory, overwrite=True, **methods[save_method], **given)


def save_gguf(
    model: Any, save_directory: str, tokenizer: Any = None, quantization_method: str = "q8_0", **given: Any
) -> Any:
    """A .gguf file with the tokenizer in it, verified."""
    import steep

    check_keys("save_pretrained_gguf", given, [])
    types = {
        "not_quantized": "bf16",
        "f16": "f16",
        "bf16": "bf16",
        "f32": "f32",
        "q8_0": "q8_0",
        "fast_quantized": "q8_0",
    }
    if quantization_method not in types:
        raise ConfigError(
            f"quantization_method={quantization_method!r} is none of {', '.join(types)}; llama.cpp's llama-quantize makes "
            "the others from f16"
        )
    return steep.export(
        trained_run(model), to="gguf", dtype=types[quantization_method], out=save_directory, overwrite=True
    )
