"""Everything a run needs before its first step, built from its configuration and checked together.

In: a RunConfig. Out: a Job. Order matters: what is cheap and often wrong comes first, weights come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steep.batch import Batch
from steep.checkpoint.consolidate import huggingface_files
from steep.checkpoint.load import verified_reference
from steep.config.recipes import recipe_lines
from steep.config.run import RunConfig
from steep.core.progress import progress_when_needed
from steep.core.say import Say
from steep.core.section import Target
from steep.data.open import RunData, open_run_data
from steep.evaluation.end_of_text import data_warnings, source_ends
from steep.evaluation.text_writer import open_writer
from steep.models.adapters import adapter_files, add_adapter, capacity_line
from steep.models.attention_choice import leak_test, prepare_lm_loss
from steep.models.config import ModelConfig
from steep.models.embeddings import offload_embeddings
from steep.models.flops import model_flops_per_token, peak_flops
from steep.models.freeze import freeze
from steep.models.layers import check_sequence_length, count_trained, has_adapter, max_positions, vocab_size
from steep.models.load import load_model
from steep.models.reference import lasting_reference
from steep.models.runner import ModelRunner
from steep.models.vocabulary import extend_embeddings, require_trained, with_embeddings
from steep.optim.build import build_optimizer
from steep.order.batches import Sizes, run_sizes
from steep.parallelize.activation_checkpoint import checkpoint_layers
from steep.parallelize.compile import compile_layers
from steep.runtime.device import (
    autocast,
    available_cores,
    choose_device,
    choose_precision,
    device_name,
    frozen_dtype,
    parameter_dtype,
)
from steep.runtime.seed import seed_everything, set_determinism
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_hf_tokenizer, text_tokenizer, tokenizer_reference
from steep.tokenizer.vocabulary import extend_tokenizer
from steep.training.engine import TorchEngine
from steep.training.trainable_check import check_groups


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    tokenizer: TextTokenizer
    data: RunData
    sizes: Sizes
    model: torch.nn.Module
    runner: ModelRunner
    engine: TorchEngine
    device: torch.device
    precision: str
    hf_files: dict[str, bytes]
    flops_per_token: float | None
    peak_flops: float | None


def assemble(
    config: RunConfig,
    say: Say,
    *,
    weights: Path | None = None,
    tokenizer_folder: Path | None = None,
    model: torch.nn.Module | None = None,
) -> Job:
    """Build and check everything before step 0. Targets have passed `targets.check_run`. Raises a SteepError.

    weights, tokenizer_folder: transformers folders to take the place of what the configuration names, for a run that is resumed.
    model: one that was made of this configuration already, adapter and all, and is trained in place.
    """
    set_determinism(config.train.deterministic)
    device = choose_device(config.train.device)
    torch.set_num_threads(config.train.threads or available_cores())
    precision = choose_precision(config.train.precision, device.type)
    say(f"device {device}, {torch.get_num_threads()} threads, precision {precision}")

    reference = tokenizer_reference(config.tokenizer, config.model)
    own = config.tokenizer.pretrained is None
    if tokenizer_folder is None or config.vocabulary is not None:
        hf_tokenizer = load_hf_tokenizer(reference, getattr(config.model, "revision", None) if own else None)
    else:
        hf_tokenizer = load_hf_tokenizer(str(tokenizer_folder))
    extension = extend_tokenizer(hf_tokenizer, config.vocabulary)
    hf_tokenizer = hf_tokenizer if extension is None else extension.tokenizer
    tokenizer = text_tokenizer(hf_tokenizer, config.tokenizer, reference)
    lines: list[str] = []  # said once the progress bar is gone
    with progress_when_needed("preparing text", "bytes") as show:
        data = open_run_data(
            config,
            tokenizer,
            lines.append,
            progress=lambda done, total, tokens: show(done, total),
            generator=open_writer,
        )
    for line in (*lines, *recipe_lines(config.to_mapping())):
        say(line)
    for message in data_warnings(
        source_ends(data.names, data.stores, tokenizer, config.data.document_mask), tokenizer.eos_token
    ):
        say(f"warning: {message}")
    sizes = run_sizes(config.train, config.data.sequence_length, data.order.sequences_per_epoch)
    data.order.check_length(sizes.total_sequences)

    model_config = config.model
    adapter = config.adapter
    if isinstance(model_config, ModelConfig) and weights is not None and adapter is None:
        model_config = ModelConfig(pretrained=str(weights), attention=model_config.attention)
    elif isinstance(model_config, ModelConfig) and model_config.pretrained is not None:
        verified = verified_reference(model_config.pretrained, say)
        model_config = model_config.model_copy(update={"pretrained": verified})
    loaded_here = model is None
    if model is None:
        dtype = parameter_dtype(precision) if adapter is None else frozen_dtype(precision)
        model = load_model(model_config, dtype=dtype, device=device, seed=config.run.seed)
    if extension is not None and config.vocabulary is not None:
        if weights is None or adapter is not None:  # a whole model that is resumed has them
            method = config.vocabulary.initialise
            for line in extend_embeddings(model, extension.subtokens, extension.rows, method):
                say(line)
            say(
                "vocabulary: lines at step 0 are of the model with its untrained new tokens; the report at the end compares with "
                "the base and its own tokenizer"
            )
        if adapter is not None:
            adapter, lines = with_embeddings(adapter, model)
            for line in lines:
                say(line)
    rows = vocab_size(model)
    check_sequence_length(model, config.data.sequence_length)
    if rope := getattr(model_config, "rope", None):
        say(f"model.rope: {rope.type}, {max_positions(model):,} positions")
    data.check_vocabulary(rows)
    fresh = getattr(config.model, "pretrained", None) is None
    align_special_tokens(model, tokenizer, fresh, say)
    if isinstance(config.model, ModelConfig) and config.model.freeze is not None:
        say(str(freeze(model, config.model.freeze)))
    if extension is not None and adapter is None:
        require_trained(model)
    if adapter is not None and loaded_here:
        base = lasting_reference(getattr(model_config, "pretrained", None))
        for line in add_adapter(model, adapter, base=base, seed=config.run.seed):
            say(line)
    if isinstance(config.model, ModelConfig) and config.model.offload_embeddings:
        say(offload_embeddings(model, device))
    if (checkpointing := config.train.activation_checkpointing) is not None:
        checkpoint_layers(model, say, **checkpointing.model_dump(), device_type=device.type)
    attention = "auto" if isinstance(config.model, Target) else config.model.attention
    with autocast(device, precision):  # so that the kernels tested are those that train
        lm_loss = prepare_lm_loss(
            model,
            say,
            attention=attention,
            vocab_size=rows or tokenizer.vocab_size,
            chunk_bytes=config.train.loss_chunk_bytes,
        )
    if config.data.document_mask:
        with autocast(device, precision):
            leak_test(lm_loss, rows or tokenizer.vocab_size)
        say("leak test passed: changing one document changes no prediction in its neighbour")
    if config.train.compile:
        say(f"compiling {compile_layers(model)} layers; the first steps are slow")
    optimizer = build_optimizer(model, config.optimizer)
    for line in check_groups(model, optimizer):
        say(line)
    if config.adapter is not None:
        say(capacity_line(count_trained(model), data.new_text_tokens(sizes.total_sequences * sizes.sequence_length)))

    def loss_sums(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(device, precision):
            losses: tuple[torch.Tensor, torch.Tensor] = lm_loss(batch)
            return losses

    engine = TorchEngine(
        model,
        loss_sums,
        optimizer,
        device=device,
        max_grad_norm=config.train.max_grad_norm,
        ema_decay=config.train.ema_decay,
    )
    seed_everything(config.run.seed)
    return Job(
        tokenizer=tokenizer,
        data=data,
        sizes=sizes,
        model=model,
        runner=ModelRunner(lm_loss, device, precision),
        engine=engine,
        device=device,
        precision=precision,
        hf_files=_hf_files(model, hf_tokenizer, say),
        flops_per_token=model_flops_per_token(model, config.data.sequence_length),
        peak_flops=peak_flops(device_name(device)),
    )


def _hf_files(model: torch.nn.Module, hf_tokenizer: Any, say: Say) -> dict[str, bytes]:
    if has_adapter(model):
        return adapter_files(model, huggingface_files(model, hf_tokenizer))
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        return huggingface_files(model, hf_tokenizer)
    say(f"checkpoints hold no model/consolidated: {type(model).__name__} has no transformers configuration")
    return {}


def align_special_tokens(model: Any, tokenizer: TextTokenizer, fresh: bool, say: Say) -> None:
    """Make generation_config stop at the token that training puts after documents, and say so where that is news.

    fresh: the model has no past, so the family's default ids, which belong to another vocabulary, are replaced.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None or tokenizer.eos_id is None or not tokenizer.append_eos:
        return
    if fresh:
        for config in (generation, model.config):
            config.eos_token_id, config.bos_token_id, config.pad_token_id = tokenizer.eos_id, tokenizer.bos_id, None
        return
    known = generation.eos_token_id
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if tokenizer.eos_id not in ids:
        generation.eos_token_id = [tokenizer.eos_id, *ids] if ids else tokenizer.eos_id
        say(
            f"generation_config: end of text is now {generation.eos_token_id} (training ends documents with {tokenizer.eos_id})"
        )
