"""A model's shapes without its weights. In: a RunConfig. Out: facts, memory by part, work per token.

The module is built on fake tensors: real code, real shapes, no data. The configuration of a .gguf file comes from its header.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steep.config.run import RunConfig
from steep.core.errors import ModelError
from steep.core.say import Say, say_nothing
from steep.core.section import Target
from steep.estimate.memory import ActivationLayout, PeakMemory, layer_input_bytes, peak_memory, saved_bytes
from steep.estimate.shapes import build_shapes
from steep.models.adapters import plan_adapter
from steep.models.attention_choice import check_wish
from steep.models.composite import auto_class, freeze_towers
from steep.models.config import ModelConfig
from steep.models.embeddings import frozen_embedding
from steep.models.experts import plan_experts
from steep.models.flops import count_matmul_parameters, flops_saved_by_freezing, model_flops_per_token
from steep.models.freeze import freeze
from steep.models.fresh import build_fresh, build_target
from steep.models.hf_config import pretrained_config
from steep.models.layers import (
    check_sequence_length,
    count_parameters,
    count_trained,
    has_adapter,
    head_weight,
    is_tied,
    text_config,
    vocab_size,
)
from steep.models.quantize import plan_quantized, quantized_line
from steep.models.reference import is_gone
from steep.models.rope import extend_rope
from steep.models.vocabulary import require_trained, with_embeddings
from steep.optim.build import optimizer_state_bytes
from steep.parallelize.activation_checkpoint import KeptBytes, checkpoint_layers, chosen_layers
from steep.parallelize.config import ActivationCheckpointing
from steep.runtime.precision import autocast, frozen_dtype, is_mixed, parameter_dtype

GUESSED_BYTES_PER_WIDTH = 68
"""Bytes per token, layer and unit of width: 34 numbers of 2 bytes, without attention (Korthikanti et al. 2022,
arXiv:2205.05198)."""


@dataclass(frozen=True)
class StructureFacts:
    """What is known about a model before it is loaded."""

    name: str
    family: str
    parameters: int
    trainable: int
    vocab_size: int
    flops_per_token: float
    memory: PeakMemory
    checkpoint_bytes: int
    """Of a checkpoint's tensors on disk, and of the copy that it is written from."""
    memory_note: str = ""
    """What to know about the memory figure; empty where everything was measured."""
    model_notes: tuple[str, ...] = ()
    """Which parts of a composite model are frozen, and what quantization leaves out."""


def measure_structure(
    config: RunConfig,
    micro_batch_size: int,
    accumulates: bool,
    precision: str,
    on_gpu: bool = False,
    vocabulary_rows: int | None = None,
) -> StructureFacts:
    """Build the model's structure and measure it. Raises ModelError, ConfigError for what cannot work.

    vocabulary_rows: embeddings that the run's tokenizer needs, where the run adds tokens to the model.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # one of torch's private modules

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    notes: list[str] = []
    dtype = parameter_dtype(precision) if config.adapter is None else frozen_dtype(precision)
    model = build_shapes(lambda: build_structure(config.model, dtype, vocabulary_rows), fake, notes.append)
    with fake:
        model_notes: list[str] = []
        _as_in_run(model, config, vocabulary_rows, model_notes.append)
        plan_experts(model)
        offloaded = on_gpu and not isinstance(config.model, Target) and config.model.offload_embeddings
        host_bytes = frozen_embedding(model).weight.nbytes if offloaded else 0  # stays in host memory beside a GPU
        ema_bytes = 4 * count_trained(model) if config.train.ema_decay is not None else 0
        head, head_table = _head_shape(model), head_weight(model)
        activations = _activations(model, config, micro_batch_size, head[1], precision, on_gpu)
        optimizer_bytes = optimizer_state_bytes(model, config.optimizer) + ema_bytes
        checkpoint_bytes = saved_weight_bytes(model) + optimizer_bytes
        memory = peak_memory(
            model,
            activations,
            micro_batch_size=micro_batch_size,
            sequence_length=config.data.sequence_length,
            head_shape=head,
            head_trained=head_table is None or head_table.requires_grad,
            head_tied=is_tied(model),
            autocast_bytes=2 if is_mixed(precision) else None,
            accumulates=accumulates,
            optimizer_bytes=optimizer_bytes,
            loss_chunk_bytes=config.train.loss_chunk_bytes,
            copied_bytes=checkpoint_bytes if config.checkpoint.copies_state else 0,
            host_bytes=host_bytes,
        )
        return StructureFacts(
            name=model_name(config.model),
            family=getattr(text_config(model), "model_type", type(model).__name__),
            parameters=count_parameters(model),
            trainable=count_trained(model),
            vocab_size=head[0],
            # a model without named sizes has no attention term
            flops_per_token=model_flops_per_token(model, config.data.sequence_length)
            or 6 * count_matmul_parameters(model) - flops_saved_by_freezing(model),
            memory=memory,
            checkpoint_bytes=checkpoint_bytes,
            model_notes=tuple(model_notes),
            memory_note=activations.note + "".join(f" ({note})" for note in notes),
        )


def _as_in_run(model: nn.Module, config: RunConfig, vocabulary_rows: int | None, say: Say) -> None:
    """Freeze, quantize and adapt the model as a run does. Raises what a run raises there.

    say: told which parts are frozen or not quantized; the rest of what a run says while its model is built, a plan does not.
    """
    freeze_towers(model, say)
    check_sequence_length(model, config.data.sequence_length)
    if isinstance(config.model, ModelConfig):
        check_wish(model, config.model.attention)
    if isinstance(config.model, ModelConfig) and config.model.freeze is not None:
        freeze(model, config.model.freeze, say_nothing)
    if vocabulary_rows is not None and config.adapter is None:
        require_trained(model)
    if isinstance(config.model, ModelConfig) and config.model.quantize is not None:
        plan_quantized(model, config.model.quantize)
        say(quantized_line(model, config.model.quantize))
    if config.adapter is not None:
        adapter = config.adapter if vocabulary_rows is None else with_embeddings(config.adapter, model, say_nothing)
        plan_adapter(model, adapter)


def _activations(
    model: nn.Module, config: RunConfig, rows: int, width: int, precision: str, on_gpu: bool
) -> ActivationLayout:
    """What autograd keeps and what is computed again; a guess, with a note, where it cannot be measured.

    Some models look at values in their forward pass (which expert a token goes to, say), and fake tensors have none.
    """
    length = config.data.sequence_length
    ids = torch.zeros(rows, length, dtype=torch.long)
    try:
        with _quiet_fake_tensors(), autocast(ids.device, precision):
            return _measured(model, config.train.activation_checkpointing, lambda: _hidden_states(model, ids), on_gpu)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - a model may do anything in its forward pass; the plan says what happened
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", None) or 1
        guess = rows * length * width * layers * GUESSED_BYTES_PER_WIDTH
        note = f" (activations are a guess: the forward pass needs data, {type(error).__name__})"
        return ActivationLayout(guess, note=note)


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """torch does not log the traceback of an operation that has no shapes: it raises the exception too, and the plan says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _measured(
    model: nn.Module, checkpointing: ActivationCheckpointing | None, forward: Callable[[], torch.Tensor], on_gpu: bool
) -> ActivationLayout:
    """The layout of a model that runs on fake tensors. Its layers are checkpointed afterwards."""
    whole = saved_bytes(model, forward)
    if checkpointing is None:
        return ActivationLayout(whole)
    layers = chosen_layers(model, checkpointing.mode, checkpointing.every)
    inputs = layer_input_bytes(layers, forward)
    selected = 0
    if checkpointing.mode == "selective":
        with KeptBytes() as counted:
            forward()
        selected = counted.total
    checkpoint_layers(model, say_nothing, checkpointing.mode, checkpointing.every)
    kept = saved_bytes(model, forward)
    return ActivationLayout(
        kept + selected - (inputs if checkpointing.offload and on_gpu else 0),
        recomputed=max(0, whole - kept - selected) // len(layers),
    )


def build_structure(config: ModelConfig | Target, dtype: torch.dtype, rows: int | None = None) -> nn.Module:
    """The model with weights that have a shape but no content, and at least `rows` embeddings. For `build_shapes`."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a module of fake tensors cannot be converted after it is built
    try:
        if isinstance(config, Target):
            return build_target(config, seed=0).train()
        if config.config is not None:
            return build_fresh(config.config, config.revision, seed=0, dtype=dtype, rope=config.rope).train()
        assert config.pretrained is not None
        hf_config = pretrained_config(config.pretrained, config.revision)
        extend_rope(hf_config, config.rope, config.pretrained)
        text = text_config(hf_config)
        text.vocab_size = max(text.vocab_size, rows or 0)
        model: nn.Module = auto_class(hf_config).from_config(hf_config, trust_remote_code=False, dtype=dtype)
        return model.train()
    finally:
        torch.set_default_dtype(usual)


def _hidden_states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, D) with one document per row: what attention keeps does not depend on where documents end."""
    base: Any = getattr(model, "base_model", model)
    output = base(input_ids=ids, use_cache=False) if base is not model else model(ids)
    return output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[no-any-return]


def saved_weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights in a checkpoint: of a model with an adapter, those that are trained."""
    if has_adapter(model):
        return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    tensors = model.state_dict(keep_vars=True).values()  # with the buffers that are saved; tied weights twice
    return sum({id(tensor): tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)}.values())


def _head_shape(model: nn.Module) -> tuple[int, int]:
    """(V, D) of the output head; of a module that does not say which layer that is, its last linear layer."""
    weight = head_weight(model)
    if weight is not None:
        return weight.shape[0], weight.shape[1]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return (linear[-1].out_features, linear[-1].in_features) if linear else (vocab_size(model) or 0, 0)


def model_name(config: ModelConfig | Target) -> str:
    """How people know the model: its reference, or where its architecture comes from."""
    if isinstance(config, Target):
        return config.target
    if config.pretrained is not None:
        path = Path(config.pretrained)
        return path.name if path.exists() or is_gone(config.pretrained) else config.pretrained
    return config.config if isinstance(config.config, str) else f"{(config.config or {}).get('model_type')} from config"
