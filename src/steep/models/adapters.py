"""Adapters: low-rank matrices beside frozen weights, through peft. In: a model and `adapter`. Out: the same model, adapted.

The model keeps its class and its own parameter names: peft puts its layers inside it. Main choice: embeddings and output head
never get low-rank matrices. They are trained in full (peft's `modules_to_save`) and stay one tensor on a model that ties them:
an adapter on a tied head is lost or doubled when it is merged, and a loss that reads `lm_head.weight` does not see it at all.
Weakness: trained embeddings take their full size in the checkpoint, twice where they are tied (peft wants both names).
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steep.core.errors import ConfigError, ModelError
from steep.core.say import Say
from steep.core.units import counted, format_count
from steep.models.config import EMBEDDING_MODULES, AdapterConfig
from steep.models.coverage import left_out
from steep.models.expert_adapters import expert_targets, plan_expert_adapters
from steep.models.layers import (
    count_trained,
    has_adapter,
    has_no_data,
    input_layer,
    is_tied,
    output_layer,
    plain_name,
    text_part,
)
from steep.models.mixture import find_experts
from steep.models.reach import not_plain
from steep.models.reference import ADAPTER_CONFIG, BASE_CONFIG
from steep.runtime.optional_packages import quiet_imports

PEFT_MAMBA_FAMILIES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
PEFT_MAMBA_LAYERS = {"out_proj", "conv1d"}
"""Layers to which peft adds nothing in these families, by its own list (0.21): their kernels read the weights directly."""

NAME_PARTS = (
    (".lora_magnitude_vector.default.weight", ".lora_magnitude_vector"),
    (".modules_to_save.default.", "."),
    (".default.", "."),
)
"""What peft removes from the names of an adapter's tensors when it saves them, in this order."""
NAME_PREFIX = "base_model.model."
"""What peft puts before these names."""


def add_adapter(
    model: nn.Module, config: AdapterConfig, say: Say, *, base: str | None, seed: int, revision: str | None = None
) -> Any:
    """Freeze `model` and put an adapter into it, in place. Returns peft's wrapper around it.

    base, revision: what to load the base from later, for adapter_config.json. seed: draws the A matrices; torch's generators
    keep their state. The adapter's tensors are fp32 (bf16 would lose small updates); the base keeps its dtype.
    Raises ConfigError for modules that do not exist, ModelError for a model that peft cannot adapt.
    """
    with quiet_imports():
        from peft import LoraConfig, get_peft_model

    targets, saved = _split_targets(model, config, say)
    stacked = expert_targets(model, config)
    tied = bool(saved) and is_tied(model)
    without = _without_adapter(model, config, {*targets, *stacked}, saved)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        use_rslora=config.rslora,
        use_dora=config.type == "dora",
        lora_dropout=config.dropout,
        bias=config.bias,
        target_modules=targets,
        target_parameters=stacked or None,
        modules_to_save=list(saved) or None,  # peft adds to the list it is given
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), quiet_imports():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # steep merges into unquantized weights
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)  # type: ignore[arg-type]
        except ValueError as error:
            raise ModelError(f"adapter: peft cannot adapt {type(model).__name__}: {error}") from error
    model.peft_config["default"].base_model_name_or_path = base  # type: ignore[index,operator,union-attr]
    model.peft_config["default"].revision = revision  # type: ignore[index,operator,union-attr]
    if config.lora_plus_ratio is not None:
        model.lora_plus_ratio = config.lora_plus_ratio  # type: ignore[assignment]
    _keep_what_is_trained(model)
    scale = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
    kind = ("rs" if config.rslora else "") + {"lora": "LoRA", "dora": "DoRA"}[config.type]
    say(
        f"adapter: {kind} of rank {config.rank}, scale {scale:.3g}, on {counted(len(targets), 'linear layer')}"
        + (f" and {counted(len(stacked), 'tensor')} of stacked experts" if stacked else "")
        + (f"; {', '.join(saved)} trained in full{' as one tensor' if tied else ''}" if saved else "")
        + f"; {count_trained(model):,} trained parameters"
    )
    if without:
        say(without)
    return wrapped


def _split_targets(model: nn.Module, config: AdapterConfig, say: Say) -> tuple[list[str], list[str]]:
    """Full names of the linear layers that get an adapter; last parts of the names of the modules that are trained in full."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise ModelError(
            f"adapter: {type(model).__name__} is not a transformers model, and peft adapts only those. Train it in full "
            "(remove `adapter`), or part of it with model.freeze."
        )
    saved = list(config.modules_to_save)
    head = _names_of(model, output_layer(model))
    ends = head | _names_of(model, input_layer(model))
    # Conv1D: transformers' GPT-2
    linear = {
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    } - head
    language = {id(module) for module in text_part(model).modules()}  # no tower of a composite model
    linear = {name for name in linear if id(model.get_submodule(name)) in language}
    if config.targets == "all-linear":
        chosen = sorted(linear - _without_effect(model, linear, say))
    else:
        whole = [name for name in config.targets if name.rpartition(".")[2] in EMBEDDING_MODULES]
        if whole:
            say(
                f"adapter: {', '.join(whole)} in targets: trained in full instead (modules_to_save); a low-rank matrix on an "
                "embedding or an output head is lost or doubled when it is merged"
            )
        saved += [name for name in whole if name not in saved]
        wanted = [name for name in config.targets if name not in whole]
        chosen = sorted(name for name in linear if any(_ends_with(name, target) for target in wanted))
        missing = [target for target in wanted if not any(_ends_with(name, target) for name in linear)]
        if missing:
            raise ConfigError(
                f"adapter.targets: {', '.join(missing)} is not a linear layer of this model. It has: "
                + ", ".join(_last_parts(linear))
            )
    names = [name for name, _ in model.named_modules()]
    absent = [name for name in saved if not any(_ends_with(known, name) for known in names)]
    if absent:
        raise ConfigError(
            f"adapter.modules_to_save: {', '.join(absent)} is not a module of this model. Its embedding and output head are: "
            + ", ".join(_last_parts(ends))
        )
    if not chosen:
        raise ConfigError("adapter.targets names no linear layer; use all-linear, or names such as [q_proj, v_proj]")
    if is_tied(model) and set(saved) & set(_last_parts(ends)):  # peft ties the head to the embedding that is saved
        saved = [name for name in saved if name not in _last_parts(head)]
        saved += [name for name in _last_parts(ends - head) if name not in saved]
    return chosen, saved


def _without_effect(model: nn.Module, linear: set[str], say: Say) -> set[str]:
    """Those of the linear layers in which an adapter would do nothing, or which peft refuses; said, with the reason."""
    left_out = set() if has_no_data(model) else not_plain(model, linear)
    if left_out:
        say(
            f"adapter: none on {', '.join(_last_parts(left_out))} ({counted(len(left_out), 'layer')}): {type(model).__name__} "
            "does not use them as plain linear layers"
        )
    if getattr(model.config, "model_type", None) in PEFT_MAMBA_FAMILIES:
        refused = {name for name in linear if name.rpartition(".")[2] in PEFT_MAMBA_LAYERS}
        say(
            f"adapter: none on {', '.join(_last_parts(refused))} ({counted(len(refused), 'layer')}), which peft refuses "
            "in Mamba models"
        )
        left_out |= refused
    return left_out


def _keep_what_is_trained(model: nn.Module) -> None:
    """Trained tensors in fp32; of modules that are trained in full, no second copy."""
    from peft.utils import ModulesToSaveWrapper  # peft takes a second to import, and only adapters need it

    for parameter in model.parameters():  # tied tensors stay one
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            # peft keeps the original, which may be large, so that the adapter can be switched off; steep never does that
            for parameter in module.original_module.parameters():
                parameter.data = parameter.data.new_empty(0)


def _without_adapter(model: nn.Module, config: AdapterConfig, adapted: set[str], saved: list[str]) -> str:
    """A line on the matrices that `all-linear` does not reach; empty where there are none, or where the user chose."""
    if config.targets != "all-linear":
        return ""
    ends = {id(getattr(layer, "weight", None)) for layer in (input_layer(model), output_layer(model))}

    def covered(name: str, parameter: Tensor) -> bool:
        module = name.rpartition(".")[0]
        whole = any(_ends_with(module, part) for part in saved)
        return name in adapted or module in adapted or whole or id(parameter) in ends

    names = left_out(model, covered)
    if not names:
        return ""
    can = find_experts(model) and not config.experts
    return f"adapter: none on {names}" + ("; adapter.experts: true adapts the experts" if can else "")


def _last_parts(names: set[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _names_of(model: nn.Module, wanted: Any) -> set[str]:
    return {name for name, module in model.named_modules() if module is wanted and wanted is not None}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by the names under which peft saves them. Tied embeddings come under both names: peft does not load
    them otherwise."""
    named = model.named_parameters(remove_duplicate=False)
    return {adapter_name(plain_name(name)): parameter.detach() for name, parameter in named if parameter.requires_grad}


def adapter_name(name: str) -> str:
    """The name in peft's files of a parameter of a model with an adapter."""
    for part, short in NAME_PARTS:
        name = name.replace(part, short)
    return NAME_PREFIX + name


BITS_PER_PARAMETER, BITS_PER_TOKEN = 2, 1
"""Bits: what a weight holds at most (Allen-Zhu and Li 2024, arXiv:2404.05405), and what a token of text teaches at most (LoRA
Without Regret, Thinking Machines 2025). Both are rough."""


def capacity_line(parameters: int, tokens: int) -> str:
    """A line on whether that many trained parameters can hold what that many different tokens of new text teach."""
    room, needed = BITS_PER_PARAMETER * parameters, BITS_PER_TOKEN * tokens
    figures = (
        f"capacity: {format_count(parameters)} trained parameters hold about {format_count(room)} bits, {format_count(tokens)} "
        f"tokens of new text teach at most about {format_count(needed)} (arXiv:2404.05405)"
    )
    if needed <= room:
        return f"{figures}: enough room"
    return f"{figures}: too small to learn all of it; a higher adapter.rank, or the whole model (remove adapter)"


def adapter_files(model: nn.Module, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files beside adapter_model.safetensors, by name, from those that go beside a whole model's weights: peft's settings are
    added, and config.json gets another name."""
    files = {BASE_CONFIG if name == "config.json" else name: data for name, data in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)  # type: ignore[index,operator,union-attr]
        files[ADAPTER_CONFIG] = (Path(folder) / ADAPTER_CONFIG).read_bytes()
    return files


def load_adapter(model: nn.Module, folder: Path, *, merge: bool) -> nn.Module:
    """`model` with the adapter of `folder` in it; with `merge`, added to its weights, so that nothing of peft remains and the
    whole model can be trained.

    Merging runs in the dtype of the weights: load them in fp32. Raises ModelError for an adapter of another model.
    """
    with quiet_imports():
        from peft import PeftModel

    try:
        with warnings.catch_warnings(), quiet_imports():
            warnings.simplefilter("ignore", FutureWarning)  # as above
            adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter does not fit {type(model).__name__}: {error}") from error
    if not merge:
        return adapted.get_base_model()
    merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    if has_adapter(merged):
        del merged.peft_config
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # peft froze the base
    return merged


# ---- for steep plan: shapes without data ----


def plan_adapter(model: nn.Module, config: AdapterConfig) -> None:
    """What `add_adapter` does, on a model of fake tensors, of which peft cannot make its layers. Raises the same errors."""
    targets, saved = _split_targets(model, config, lambda line: None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plan_expert_adapters(model, config)
    tied = is_tied(model)
    for name in targets:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, PlannedAdapter(model.get_submodule(name), config))
    for name, module in list(model.named_modules()):
        if any(_ends_with(name, wanted) for wanted in saved):
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32)))
    if tied:
        output_layer(model).weight = input_layer(model).weight
    model.peft_config = {}  # type: ignore[assignment]
    if config.lora_plus_ratio is not None:
        model.lora_plus_ratio = config.lora_plus_ratio  # type: ignore[assignment]


class PlannedAdapter(nn.Module):
    """A linear layer with its low-rank matrices, as a memory plan sees it."""

    def __init__(self, layer: Any, config: AdapterConfig):
        super().__init__()
        outputs, inputs = (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else (
            layer.weight.shape[1], layer.weight.shape[0])  # fmt: skip
        self.base_layer = layer
        self.lora_A = nn.Linear(inputs, config.rank, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(config.rank, outputs, bias=False, dtype=torch.float32)
        self.magnitude = nn.Parameter(torch.empty(outputs, dtype=torch.float32)) if config.type == "dora" else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        output: torch.Tensor = self.base_layer(hidden)
        update: torch.Tensor = self.lora_B(self.lora_A(self.dropout(hidden)))
        if self.magnitude is not None:
            return output + self.magnitude * output + self.magnitude * update
        return output + update
