"""`steep plan`: what a run would do, from shapes alone. In: a RunConfig. Out: a RunPlan. No weight is loaded.

Text that is not yet a token store is prepared (and cached for the run), since tokens cannot be counted otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steep.config.load import ConfigLike, as_config
from steep.config.recipes import recipe_lines
from steep.config.run import RunConfig
from steep.core import targets
from steep.core.errors import ConfigError
from steep.core.html import bars, notebook_table, preformatted
from steep.core.progress import progress_when_needed
from steep.core.public import Readable, public
from steep.core.say import Say, say_nothing, tell
from steep.core.section import Target
from steep.core.units import format_bytes, format_count, format_seconds
from steep.data.held_out_text import HeldOutText
from steep.data.open import RunData, open_run_data
from steep.data.overlap import trained_documents
from steep.estimate.automatic import AUTO, choose, likely_saves, with_values
from steep.estimate.disk import CheckpointPlan, plan_checkpoints
from steep.estimate.hardware import Hardware, find_hardware
from steep.estimate.scoring import ScoringPlan, choose_tokens, plan_scoring
from steep.estimate.settle import as_begun
from steep.estimate.structure import StructureFacts, model_name
from steep.evaluation.forgetting import role_of
from steep.models.adapters import capacity_line
from steep.models.config import ModelConfig
from steep.models.load import check_weights
from steep.models.reference import base_reference, describe_origin, resolve_reference
from steep.order.batches import Sizes, run_sizes
from steep.runtime.device import resident_bytes
from steep.tokenizer.open import load_tokenizer

BAR_COLUMNS = 40


@dataclass(frozen=True, repr=False)
class RunPlan(Readable):
    """Everything about a run that is known before it starts."""

    config: RunConfig
    structure: StructureFacts
    hardware: Hardware
    precision: str
    sizes: Sizes
    data: RunData
    vocabulary_rows: int | None = None
    """Embeddings that the tokenizer needs, where the run adds tokens."""
    process_bytes: int = 0
    """Memory of this process before it held anything of the run."""
    remarks: list[str] = field(default_factory=list)
    """What was said while the data was opened."""
    choices: list[str] = field(default_factory=list)
    """What was chosen where the configuration says `auto`, and why."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, padding included."""
        return self.sizes.total_sequences * self.sizes.sequence_length

    @property
    def epochs(self) -> float:
        """Passes over the training data."""
        return self.sizes.total_sequences / self.data.order.sequences_per_epoch

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part on the device, at the moment that needs most."""
        return self.structure.memory.parts(self.hardware.device_type, self.process_bytes)

    @property
    def peak_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Expected time of training."""
        return self.tokens * self.structure.flops_per_token / self.hardware.expected_flops(self.precision)

    @property
    def scoring(self) -> ScoringPlan:
        """What scoring the held-out texts costs."""
        frozen = self.structure.trainable < self.structure.parameters
        return plan_scoring(self.config, self.sizes, self.data.held_out_texts, frozen)

    @property
    def checkpoints(self) -> CheckpointPlan:
        """When the run is saved, and the space that this takes."""
        saves = likely_saves(self.config, self.sizes, self.seconds)
        return plan_checkpoints(self.config, self.structure.checkpoint_bytes, saves, is_here=self.hardware.is_here)

    def to_mapping(self) -> dict[str, Any]:
        """The plan as JSON values: plan.json."""
        optimizer = self.config.optimizer
        return {
            "model": {
                "name": self.structure.name,
                "pretrained": getattr(self.config.model, "pretrained", None),
                "family": self.structure.family,
                "parameters": self.structure.parameters,
                "trainable": self.structure.trainable,
            },
            "data": {
                "sequence_length": self.sizes.sequence_length,
                "fingerprint": self.data.order.fingerprint,
                "sources": self._sources(),
                "held_out": [
                    {"name": text.name, "tokens": text.num_tokens, "role": text.role}
                    for text in self.data.held_out_texts
                ],
            },
            "device": self.hardware.name,
            "precision": self.precision,
            "seed": self.config.run.seed,
            "optimizer": optimizer.target if isinstance(optimizer, Target) else optimizer.name,
            "learning_rate": None if isinstance(optimizer, Target) else optimizer.learning_rate,
            "embedding_learning_rate": None if isinstance(optimizer, Target) else optimizer.embedding_learning_rate,
            "schedule": self.config.schedule.name,
            "global_batch_size": self.sizes.global_batch_size,
            "micro_batch_size": self.sizes.micro_batch_size,
            "grad_accum_steps": self.sizes.grad_accum_steps,
            "steps": self.sizes.steps,
            "forgetting_cap": self.config.evaluate.forgetting_cap,
            "tokens": self.tokens,
            "epochs": self.epochs,
            "memory": {**self.memory, "total": self.peak_bytes},
            "memory_note": self.structure.memory.note,
            "memory_available_bytes": self.hardware.memory_bytes,
            "seconds": self.seconds,
            "scoring": {**self.scoring.to_mapping(), "seconds": self.scoring.ratio * self.seconds},
            "checkpoints": self.checkpoints.to_mapping(),
        }

    def _sources(self) -> list[dict[str, Any]]:
        order = self.data.order
        counts = order.counts(self.sizes.total_sequences)
        return [
            {
                "name": source.name,
                "role": source.role,
                "documents": trained_documents(source, store),
                "tokens": source.num_tokens,
                "sequences": None if source.order is not None else sequences,
                "epochs": None if source.order is not None else count / sequences if sequences else 0.0,
                "share": count / max(1, sum(counts)),
            }
            for source, store, sequences, count in zip(
                order.sources, self.data.stores, order.sequences_of_source, counts, strict=True
            )
        ]

    def _scoring_text(self) -> str:
        scoring = self.scoring
        texts = "the held-out text" if scoring.texts == 1 else f"{scoring.texts} held-out texts"
        return (
            f"{scoring.evaluations} x {format_count(scoring.tokens)} tokens of {texts}, about "
            f"{format_seconds(scoring.ratio * self.seconds)} ({scoring.ratio:.0%} of training)"
        )

    def facts(self) -> list[tuple[str, str]]:
        """What the plan says, each with the name of what it is about; without a name it belongs to the one before."""
        facts, sizes = self.structure, self.sizes
        accumulation = f", {sizes.grad_accum_steps} x {sizes.micro_batch_size}" if sizes.grad_accum_steps > 1 else ""
        trained = "" if facts.trainable == facts.parameters else f", {format_count(facts.trainable)} trained"
        adapted = self.config.adapter is not None
        capacity = capacity_line(facts.trainable, self.data.new_text_tokens(self.tokens)) if adapted else ""
        batch = f"{sizes.global_batch_size} x {sizes.sequence_length:,} tokens{accumulation}"
        return [
            ("model", f"{facts.name}: {facts.family}, {format_count(facts.parameters)} parameters{trained}"),
            *(("", note) for note in facts.model_notes),
            *([("", capacity)] if capacity else []),
            ("device", f"{self.hardware.name}, precision {self.precision}"),
            *(("data", _source_text(source)) for source in self._sources()),
            *(("", remark) for remark in self.remarks),
            *(("held out", _held_out_text(text)) for text in self.data.held_out_texts),
            ("run", f"{sizes.steps:,} steps of {batch} = {format_count(self.tokens)} tokens"),
            *(("", choice) for choice in self.choices),
            ("time", f"about {format_seconds(self.seconds)} of training ({self.hardware.basis})"),
            *([("scoring", self._scoring_text())] if self.scoring.texts else []),
            (
                "memory",
                f"{format_bytes(self.peak_bytes)} of {format_bytes(self.hardware.memory_bytes)}{facts.memory_note}",
            ),
            *([("", facts.memory.note)] if facts.memory.note else []),
            ("saving", self.checkpoints.to_text()),
        ]

    def to_text(self) -> str:
        lines = [f"plan of {self.config.run.name}"]
        for name, text in self.facts():
            lines += [f"  {name:<10}{text}", *(memory_bar(self.memory) if name == "memory" else [])]
        return "\n".join([*lines, *(f"  {line}" for line in recipe_lines(self.config.to_mapping()))])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        recipe = "\n".join(recipe_lines(self.config.to_mapping()))
        bytes_text = {name: format_bytes(size) for name, size in self.memory.items()}
        return (
            notebook_table(["plan of", self.config.run.name], self.facts(), numbers_from=99)
            + bars(self.memory, bytes_text)
            + (preformatted(recipe) if recipe else "")
        )


def _source_text(source: dict[str, Any]) -> str:
    size = f"{source['documents']:,} documents, {format_count(source['tokens'])} tokens, {source['epochs'] or 0:.2f} epochs"
    what = "streamed, size not known" if source["epochs"] is None else size
    replay = " (replay)" if source["role"] == "replay" else ""
    return f"{source['name']}: {what}, {source['share']:.1%} of the sequences{replay}"


def _held_out_text(text: HeldOutText) -> str:
    return f"{text.name}: {format_count(text.num_tokens)} tokens, {role_of(text.name, text.role)[0]} text"


def memory_bar(parts: dict[str, int]) -> list[str]:
    """One line per part, drawn to a common scale, each starting where the one before it ended."""
    scale = BAR_COLUMNS / max(1, sum(parts.values()))
    lines, start = [], 0.0
    for name, size in parts.items():
        stop = start + size * scale
        columns = round(stop) - round(start)
        lines.append(f"    {name:<16}{format_bytes(size):>10}  {' ' * round(start)}{'█' * columns}")
        start = stop
    return lines


@public
def plan(config: ConfigLike, *, device: str = "auto", allow_code: bool = True) -> RunPlan:
    """What a run would do: sizes, tokens, steps, memory by part, time. Loads no weights. A run that has begun keeps its choices.

    config: a RunConfig, its values as a mapping, or the path of a YAML file. device: `auto`, `cpu`, or a GPU's name such as
    `h100`. allow_code: whether `_target_` may run code outside steep, torch and transformers. Raises a SteepError for what cannot
    work.
    """
    found = plan_unchecked(as_config(config), device=device, allow_code=allow_code)
    found.data.check_vocabulary(found.structure.vocab_size)
    if found.peak_bytes > found.hardware.memory_bytes:
        raise ConfigError(
            f"the run needs about {format_bytes(found.peak_bytes)}, and {found.hardware.name} has "
            f"{format_bytes(found.hardware.memory_bytes)}.\n"
            + "\n".join(memory_bar(found.memory))
            + "\n  What helps: a smaller train.micro_batch_size (same result), train.activation_checkpointing true (same "
            "result), train.precision bf16, checkpoint.asynchronous false on a CPU; steep plan --fit lists what fits."
        )
    found.checkpoints.check()
    return found


def plan_unchecked(config: RunConfig, *, device: str = "auto", allow_code: bool = True) -> RunPlan:
    """The plan of a run that may be too large for its device. Raises a SteepError for what else cannot work."""
    targets.check_run(config, tell, allow_code)
    hardware = find_hardware(config.train.device if device == "auto" else device, config.train.threads)
    remarks: list[str] = []
    choices: list[str] = []
    if device == "auto":
        config = as_begun(config, choices.append)
    config = _with_precision(config, hardware, choices.append)
    source = _own_weights(config, remarks.append)
    if source is None:
        tokenizer = load_tokenizer(config.tokenizer, config.model, vocabulary=config.vocabulary)
    else:  # new tokens are in the run's own tokenizer
        tokenizer = load_tokenizer(config.tokenizer.model_copy(update={"pretrained": source.pretrained}))
    pretrained = getattr(source or config.model, "pretrained", None)
    if pretrained is not None:
        check_weights(pretrained, getattr(config.model, "revision", None))
    with progress_when_needed("preparing text", "bytes") as show:
        data = open_run_data(config, tokenizer, remarks.append, progress=lambda done, total, tokens: show(done, total))
    if pretrained is not None and (line := describe_origin(pretrained)) is not None:
        remarks.append(line)
    sizes = run_sizes(config.train, config.data.sequence_length, data.order.sequences_per_epoch)
    data.order.check_length(sizes.total_sequences)
    found = plan_opened(config, data, sizes, hardware, tokenizer.vocab_size, source)
    return replace(found, remarks=remarks, choices=[*choices, *found.choices])


def _with_precision(config: RunConfig, hardware: Hardware, say: Say = say_nothing) -> RunConfig:
    """The configuration with the precision that a run on `hardware` would choose in place of `auto`."""
    precision = hardware.choose_precision(config.train.precision, threads=config.train.threads, say=say)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _own_weights(config: RunConfig, say: Say) -> ModelConfig | None:
    """The newest checkpoint of the run, for one that goes on after what it started from is gone; None for any other run.

    Raises ModelError where that checkpoint holds an adapter, which needs its base.
    """
    model, checkpoints = config.model, Path(config.run.directory).expanduser() / config.run.name / "checkpoints"
    if isinstance(model, Target) or model.pretrained is None or not (checkpoints / "LATEST").is_file():
        return None
    folder = resolve_reference(str(checkpoints))
    if folder is None or Path(model.pretrained).expanduser().exists():
        return None
    if config.adapter is not None:
        return model.model_copy(update={"pretrained": base_reference(folder)[0]})
    say(f"model: the run's own checkpoint; {model.pretrained} is not there")
    return ModelConfig(pretrained=str(folder), attention=model.attention)


def plan_opened(
    config: RunConfig,
    data: RunData,
    sizes: Sizes,
    hardware: Hardware,
    vocabulary_rows: int,
    source: ModelConfig | Target | None = None,
) -> RunPlan:
    """The plan of a run whose data is open, with numbers where `config` and `sizes` leave them to steep.

    vocabulary_rows: embeddings that its tokenizer needs. source: what to read the model's shapes from, where that is not what the
    configuration names, which may be gone: a checkpoint of the run.
    """
    held = resident_bytes() or 0
    config = _with_precision(config, hardware)
    rows = vocabulary_rows if config.vocabulary is not None else None
    chosen = choose(config, sizes, hardware, rows, _with_own_shapes(config.model, source))
    structure = replace(chosen.structure, name=model_name(config.model))
    precision = config.train.precision
    config, lines = chosen.config, chosen.lines
    if config.evaluate.tokens == AUTO:
        tokens, why = choose_tokens(config, chosen.sizes, data.held_out_texts)
        config, lines = with_values(config, {"evaluate.tokens": tokens}), [*lines, *([why] if why else [])]
    return RunPlan(config, structure, hardware, precision, chosen.sizes, data, rows, held, choices=lines)


def _with_own_shapes(model: ModelConfig | Target, source: ModelConfig | Target | None) -> ModelConfig | Target:
    """The model section with the weights of `source`, whose configuration has the extended positions already."""
    if not isinstance(model, ModelConfig) or not isinstance(source, ModelConfig) or source.pretrained is None:
        return model
    own = {"pretrained": source.pretrained, "config": None, "rope": source.rope, "revision": source.revision}
    return model.model_copy(update=own)
