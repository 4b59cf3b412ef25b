"""Everything a run needs before its first step, built from its configuration and checked together.

In: a RunConfig. Out: a Job. Order matters: what is cheap and often wrong comes first, weights come last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steep.checkpoint.consolidate import huggingface_files
from steep.checkpoint.finite import check_start
from steep.checkpoint.folder import CONSOLIDATED_FILE
from steep.checkpoint.load import verified_reference
from steep.config.recipes import recipe_lines
from steep.config.run import RunConfig
from steep.core.errors import ModelError
from steep.core.progress import progress_when_needed
from steep.core.say import Say
from steep.core.section import Target
from steep.data.open import RunData, follow_streams, open_run_data
from steep.estimate.automatic import AUTO, with_values
from steep.estimate.hardware import find_hardware
from steep.estimate.run_plan import RunPlan, plan_opened
from steep.evaluation.end_of_text import data_warnings, source_ends
from steep.evaluation.text_writer import open_writer
from steep.loader import Loader
from steep.models.adapters import adapter_files, add_adapter, capacity_line
from steep.models.attention_choice import check_causal, leak_test, prepare_lm_loss, recorded_choice
from steep.models.balance_choice import prepare_balance
from steep.models.composite import freeze_towers, is_composite, processor_files
from steep.models.config import ModelConfig
from steep.models.embeddings import offload_embeddings
from steep.models.experts import use_grouped_experts
from steep.models.flops import model_flops_per_token
from steep.models.freeze import freeze
from steep.models.fresh import take_special_tokens
from steep.models.generation_settings import mend_generation_settings
from steep.models.layers import (
    check_sequence_length,
    count_trained,
    has_adapter,
    max_positions,
    vocab_size,
)
from steep.models.load import load_model
from steep.models.quantize import quantized_line
from steep.models.reach import freeze_unreached
from steep.models.reference import (
    ADAPTER_WEIGHTS,
    describe_origin,
    gone_base,
    is_gone,
    lasting_reference,
    named_base,
)
from steep.models.runner import ModelRunner
from steep.models.vocabulary import extend_embeddings, require_trained, with_embeddings
from steep.optim.build import build_optimizer
from steep.order.batches import Sizes, run_sizes
from steep.parallelize.activation_checkpoint import checkpoint_layers
from steep.parallelize.compile import compile_layers
from steep.runtime.device import choose_device, default_threads, device_name, peak_flops
from steep.runtime.precision import autocast, choose_precision, frozen_dtype, parameter_dtype
from steep.runtime.ranks import Ranks
from steep.runtime.seed import seed_everything, set_determinism
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.open import check_read_back, text_tokenizer, tokenizer_reference
from steep.tokenizer.vocabulary import Extension, extend_tokenizer
from steep.training.engine import Engine, TorchEngine
from steep.training.rehearsal import sizes_that_fit
from steep.training.trainable_check import check_groups


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    config: RunConfig
    """As given, with numbers where it left them to steep."""
    plan: RunPlan | None
    """Of a run that starts; None for one that is resumed."""
    tokenizer: TextTokenizer
    data: RunData
    sizes: Sizes
    engine: Engine
    hf_files: dict[str, bytes]
    """The other files of the transformers folder in a checkpoint, by name."""
    weights_file: str
    """What transformers or peft call the weights there."""
    source: ModelConfig | Target
    """What the weights were loaded from: what the configuration names, or a checkpoint of the run itself."""
    model_choice: dict[str, Any]
    """How the model is run, for checkpoints: a resumed run takes the same."""
    flops_per_token: float | None
    peak_flops: float | None


@dataclass(frozen=True)
class Texts:
    """A run's tokenizer, and its texts in its order."""

    tokenizer: TextTokenizer
    hf_tokenizer: Any
    """The same tokenizer as transformers has it."""
    extension: Extension | None
    """The tokens that the run adds, if it adds any."""
    data: RunData
    sizes: Sizes


@dataclass(frozen=True)
class Compute:
    """Where and in what a run computes."""

    device: torch.device
    precision: str


def assemble(
    config: RunConfig,
    say: Say,
    *,
    ranks: Ranks,
    weights: Path | None = None,
    tokenizer_folder: Path | None = None,
    model: nn.Module | None = None,
    recorded: dict[str, Any] | None = None,
) -> Job:
    """Build and check everything before step 0. Targets have passed `targets.check_run`. Raises a SteepError.

    weights, tokenizer_folder: transformers folders that take the place of what the configuration names, for a resumed run.
    model: one that was made of this configuration already, adapter and all, and is trained in place. recorded: how the model of
    a resumed run was run.
    """
    compute = choose_compute(config, say)
    texts = open_texts(config, say, ranks, tokenizer_folder)
    source = find_weights(config, say, weights)
    plan, leaves_micro_batch = None, config.train.micro_batch_size == AUTO
    if weights is None:
        plan = plan_start(config, texts, compute, source, say)
        config, texts = plan.config, replace(texts, sizes=plan.sizes)
    trained = load_trained(config, texts, compute, say, source, model, resumed=weights is not None)
    runner = prepare_runner(config, texts, compute, trained, say, recorded)
    engine = build_engine(config, texts, runner, say)
    if plan is not None and leaves_micro_batch and compute.device.type == "cuda":
        sizes = sizes_that_fit(engine, plan.sizes, texts.tokenizer.vocab_size, plan.structure.memory.optimizer, say)
        if sizes != plan.sizes:
            texts = replace(texts, sizes=sizes)
            config = with_values(config, {"train.micro_batch_size": sizes.micro_batch_size})
            plan = plan_start(config, texts, compute, source, say)
    hf_files = _hf_files(trained, texts.hf_tokenizer, source, say)
    if weights is None and config.tokenizer.pretrained is not None and "config.json" in hf_files:
        check_read_back(hf_files, config.tokenizer, texts.tokenizer)
    seed_everything(config.run.seed)
    return Job(
        config=config,
        plan=plan,
        tokenizer=texts.tokenizer,
        data=texts.data,
        sizes=texts.sizes,
        engine=engine,
        hf_files=hf_files,
        weights_file=ADAPTER_WEIGHTS if has_adapter(trained) else CONSOLIDATED_FILE,
        source=source,
        model_choice=recorded_choice(runner.lm_loss, _asked_attention(config)),
        flops_per_token=model_flops_per_token(trained, config.data.sequence_length),
        peak_flops=peak_flops(device_name(compute.device)),
    )


def choose_compute(config: RunConfig, say: Say) -> Compute:
    """Device, threads and precision of this process, set and said. Raises ConfigError."""
    set_determinism(config.train.deterministic)
    device = choose_device(config.train.device)
    torch.set_num_threads(config.train.threads or default_threads())
    precision = choose_precision(config.train.precision, device.type, threads=config.train.threads, say=say)
    say(f"device {device}, {torch.get_num_threads()} threads, precision {precision}")
    return Compute(device, precision)


def open_texts(config: RunConfig, say: Say, ranks: Ranks, tokenizer_folder: Path | None) -> Texts:
    """The tokenizer, the data and the sizes that follow from it. The first rank prepares text, the others find it prepared."""
    reference = tokenizer_reference(config.tokenizer, config.model)
    own = config.tokenizer.pretrained is None
    if tokenizer_folder is None or (config.vocabulary is not None and config.adapter is not None):
        hf_tokenizer = load_hf_tokenizer(reference, getattr(config.model, "revision", None) if own else None, say)
        extension = extend_tokenizer(hf_tokenizer, config.vocabulary)
        hf_tokenizer = hf_tokenizer if extension is None else extension.tokenizer
    else:  # the run's own files have it, new tokens and all
        hf_tokenizer, extension = load_hf_tokenizer(str(tokenizer_folder), say=say), None
    tokenizer = text_tokenizer(hf_tokenizer, config.tokenizer, reference)
    lines: list[str] = []  # said once the progress bar is gone
    with progress_when_needed("preparing text", "bytes") as show, ranks.first_before_others():
        data = open_run_data(
            config, tokenizer, lines.append, progress=lambda done, total, _: show(done, total), generator=open_writer
        )
    follow_streams(data, say)
    for line in (*lines, *recipe_lines(config.to_mapping())):
        say(line)
    ends = source_ends(data.names, data.stores, tokenizer, config.data.document_mask)
    for message in data_warnings(ends, tokenizer.eos_token):
        say(f"warning: {message}")
    sizes = run_sizes(config.train, config.data.sequence_length, data.order.sequences_per_epoch, ranks.world)
    data.order.check_length(sizes.total_sequences)
    return Texts(tokenizer, hf_tokenizer, extension, data, sizes)


def plan_start(config: RunConfig, texts: Texts, compute: Compute, source: ModelConfig | Target, say: Say) -> RunPlan:
    """The plan of a run that starts, which chooses what its configuration leaves to steep. Raises ModelError, ConfigError."""
    hardware = find_hardware(str(compute.device), config.train.threads)
    plan = plan_opened(config, texts.data, texts.sizes, hardware, texts.tokenizer.vocab_size, source)
    for choice in plan.choices:
        say(choice)
    return plan


def load_trained(
    config: RunConfig,
    texts: Texts,
    compute: Compute,
    say: Say,
    source: ModelConfig | Target,
    model: nn.Module | None,
    resumed: bool,
) -> nn.Module:
    """The model to train: loaded unless it is given, with new tokens, frozen parts and adapter. Raises a SteepError."""
    adapter, given = config.adapter, model is not None
    if model is None:
        dtype = parameter_dtype(compute.precision) if adapter is None else frozen_dtype(compute.precision)
        model = load_model(source, dtype=dtype, device=compute.device, seed=config.run.seed)
        if method := getattr(source, "quantize", None):
            say(quantized_line(model, method))
    freeze_towers(model, say)
    mend_generation_settings(model, say)
    if texts.extension is not None and config.vocabulary is not None:
        if not resumed or adapter is not None:  # a complete model that is resumed has them
            extension = texts.extension
            extend_embeddings(model, extension.subtokens, extension.rows, config.vocabulary.initialise, say)
            say(
                "vocabulary: scores at step 0 are those of the model with untrained new tokens; the report at the end "
                "compares with the base and its own tokenizer"
            )
        if adapter is not None:
            adapter = with_embeddings(adapter, model, say)
    check_sequence_length(model, config.data.sequence_length)
    if rope := getattr(source, "rope", None):
        say(f"model.rope: {rope.type}, {max_positions(model):,} positions")
    texts.data.check_vocabulary(vocab_size(model))
    check_start(model, str(getattr(source, "pretrained", None) or "the model"))
    fresh = getattr(config.model, "pretrained", None) is None
    align_special_tokens(model, texts.tokenizer, fresh, say)
    if isinstance(config.model, ModelConfig) and config.model.freeze is not None:
        freeze(model, config.model.freeze, say)
    if texts.extension is not None and adapter is None:
        require_trained(model)
    if adapter is not None and not given:
        base, revision = lasting_reference(getattr(source, "pretrained", None)), getattr(source, "revision", None)
        add_adapter(model, adapter, say, base=base, revision=revision, seed=config.run.seed)
    return model


def find_weights(config: RunConfig, say: Say, weights: Path | None) -> ModelConfig | Target:
    """What the weights are loaded from: the run's own checkpoint (`weights`), else what the configuration names; said where an
    adapter is merged. The base of an adapter that is resumed is the one that it was trained on, though the run it came from may
    have newer weights by now. Raises ModelError, CheckpointError for a base that is gone or damaged.
    """
    model = config.model
    if not isinstance(model, ModelConfig):
        return model
    if weights is not None and config.adapter is None:
        return ModelConfig(pretrained=str(weights), attention=model.attention)
    if model.pretrained is None:
        return model
    named = model.pretrained if weights is None else _base_of_resumed(weights, model.pretrained, say)
    found = verified_reference(named, say)
    if (line := describe_origin(found)) is not None:
        say(line)
        if config.adapter is not None:
            say(
                "model: only steep can load an adapter whose base is an adapter run; for peft, export the base first "
                f"(steep export {model.pretrained} --to hf) and start from that folder"
            )
    return model.model_copy(update={"pretrained": found})


def _base_of_resumed(weights: Path, configured: str, say: Say) -> str:
    """The base that the adapter in `weights` names; where it is gone (the folder was moved), what the configuration names."""
    base, _ = named_base(weights)
    if not is_gone(base):
        return base
    path = Path(configured).expanduser()
    now = verified_reference(configured, say) if path.exists() else configured
    in_run, checkpoint = Path(base).parts[-2:] == ("model", "consolidated"), Path(base).parts[-3:-2]
    if not path.exists() or (in_run and Path(now).parts[-3:-2] != checkpoint):
        raise ModelError(gone_base(weights, base))
    say(f"base: {now}; it was {base}, which is gone")
    return now


def _asked_attention(config: RunConfig) -> str:
    return "auto" if isinstance(config.model, Target) else config.model.attention


def prepare_runner(
    config: RunConfig,
    texts: Texts,
    compute: Compute,
    model: nn.Module,
    say: Say,
    recorded: dict[str, Any] | None = None,
) -> ModelRunner:
    """How the model is run on batches: memory, attention, head and loss, checked on a few tokens. Raises a SteepError.

    recorded: the choice of the run that is continued, which passed these checks when it began.
    """
    device, precision = compute.device, compute.precision
    if isinstance(config.model, ModelConfig) and config.model.offload_embeddings:
        offload_embeddings(model, device, say)
    if (checkpointing := config.train.activation_checkpointing) is not None:
        checkpoint_layers(model, say, **checkpointing.model_dump(), device_type=device.type)
    use_grouped_experts(model)
    asked, masked = _asked_attention(config), config.data.document_mask
    rows = vocab_size(model) or texts.tokenizer.vocab_size
    with autocast(device, precision):  # so that the kernels tested are those that train
        lm_loss = prepare_lm_loss(
            model, say, attention=asked, vocab_size=rows, chunk_bytes=config.train.loss_chunk_bytes,
            document_mask=masked, recorded=recorded,
        )  # fmt: skip
        if not recorded or recorded["asked"] != asked:
            check_causal(lm_loss, rows)
            if masked:
                leak_test(lm_loss, rows)
                say("leak test passed: changing one document changes no prediction in its neighbour")
        freeze_unreached(lm_loss, config.data.sequence_length, say, rows)
        prepare_balance(lm_loss, say, getattr(config.model, "balance_loss", None), rows)
    if config.train.compile:
        say(f"compiling {compile_layers(model)} layers; the first steps are slow")
    return ModelRunner(lm_loss, device, precision)


def build_engine(config: RunConfig, texts: Texts, runner: ModelRunner, say: Say) -> Engine:
    """The optimizer over what is trained, and the engine that owns both. Raises ConfigError, ModelError."""
    optimizer = build_optimizer(runner.model, config.optimizer)
    check_groups(runner.model, optimizer, say)
    if config.adapter is not None:
        run_tokens = texts.sizes.total_sequences * texts.sizes.sequence_length
        say(capacity_line(count_trained(runner.model), texts.data.new_text_tokens(run_tokens)))
    return TorchEngine(runner, optimizer, max_grad_norm=config.train.max_grad_norm, ema_decay=config.train.ema_decay)


def open_loader(config: RunConfig, job: Job, start_step: int, ranks: Ranks) -> Loader:
    """The batches of this rank from `start_step` on."""
    return Loader(
        job.data.order, job.data.stores, job.sizes, start_step=start_step, rank=ranks.rank,
        document_mask=config.data.document_mask, pin_memory=job.engine.device.type == "cuda",
    )  # fmt: skip


def _hf_files(model: nn.Module, hf_tokenizer: Any, source: ModelConfig | Target, say: Say) -> dict[str, bytes]:
    pretrained, revision = getattr(source, "pretrained", None), getattr(source, "revision", None)
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        is_seeing = pretrained is not None and is_composite(model.config)
        processor = processor_files(str(pretrained), revision) if is_seeing else {}
        files = {**processor, **huggingface_files(model, hf_tokenizer)}
        return adapter_files(model, files) if has_adapter(model) else files
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
        take_special_tokens(model, tokenizer.eos_id, tokenizer.bos_id)
        return
    known = generation.eos_token_id
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if tokenizer.eos_id not in ids:
        generation.eos_token_id = [tokenizer.eos_id, *ids] if ids else tokenizer.eos_id
        say(
            f"generation_config: end of text is now {generation.eos_token_id} (training ends documents with {tokenizer.eos_id})"
        )
