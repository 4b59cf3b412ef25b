"""`steep evaluate`: one or two models scored on texts. In: references and paths. Out: an Evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.core.html import notebook_table, preformatted
from steep.core.progress import progress_bar
from steep.core.public import Readable, public
from steep.core.say import Say, say_nothing, tell
from steep.core.table import text_table
from steep.core.units import parse_count
from steep.data.held_out_text import HeldOutText
from steep.data.open import RunData, open_run_data
from steep.evaluation.config import DEFAULT_CAP_RATIO
from steep.evaluation.end_of_text import (
    EndOfTextAudit,
    StopScore,
    audit,
    measure_stops,
    named_ids_of_folders,
    source_ends,
)
from steep.evaluation.forgetting import ForgettingReport, forgetting_report, roles_of
from steep.evaluation.held_out import Beginnings, Score, choose_beginnings, score_text
from steep.evaluation.loaded_model import LoadedModel, open_model
from steep.evaluation.model_reference import Reference, base_model_reference, config_of_run, model_reference, run_of
from steep.evaluation.retokenize import is_of_parts, retokenized
from steep.evaluation.text_writer import open_writer
from steep.models.layers import check_sequence_length, max_positions
from steep.sources.config import SourceConfig
from steep.sources.lingua import validation_paths
from steep.store.cache import open_sources
from steep.tokenizer.encode import TextTokenizer

DEFAULT_SEQUENCE_LENGTH = 1024
DEFAULT_TOKENS = 200_000


@dataclass(frozen=True, repr=False)
class Evaluation(Readable):
    """The scores of a model, and of another model for comparison."""

    model: str
    scores: list[Score]
    against: str | None = None
    against_scores: list[Score] | None = None
    forgetting: ForgettingReport | None = None
    """From the model of `against` to this one; None without `against`."""
    end_of_text: EndOfTextAudit | None = None
    """Whether both models stop where documents end; None without `against`."""
    roles: dict[str, str | None] = field(default_factory=dict)
    """The role that the configuration of the run gives each text, if it gives one."""

    def to_mapping(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        mapping: dict[str, Any] = {"model": self.model, "scores": [score.to_mapping() for score in self.scores]}
        if self.against_scores is not None:
            mapping["against"] = self.against
            mapping["against_scores"] = [score.to_mapping() for score in self.against_scores]
        if self.forgetting is not None:
            mapping["forgetting"] = self.forgetting.to_mapping()
        if self.end_of_text is not None:
            mapping["end_of_text"] = self.end_of_text.to_mapping()
        return mapping

    @property
    def title(self) -> str:
        """What was scored."""
        return f"{self.model} against {self.against}" if self.against else self.model

    def rows(self) -> list[tuple[str, ...]]:
        """The head, then one row of strings per text."""
        rows: list[tuple[str, ...]] = [
            ("text", "nats/token", "perplexity", "bits/byte", *(["against", "change"] if self.against else []))
        ]
        others: Sequence[Score | None] = self.against_scores or [None] * len(self.scores)
        for score, other in zip(self.scores, others, strict=True):
            row = (score.text, f"{score.nats_per_token:.4f}", f"{score.perplexity:.3f}", _bits(score))
            rows.append(row + ((_bits(other), _change(score, other)) if other else ()))
        return rows

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        head, *rows = self.rows()
        reports = [report.to_text() for report in (self.forgetting, self.end_of_text) if report is not None]
        return notebook_table(head, rows, self.title) + "".join(map(preformatted, reports))

    def to_text(self) -> str:
        tokens = ", ".join(f"{s.text}: {s.tokens:,} tokens of {s.documents:,} documents" for s in self.scores)
        reports = [report.to_text() for report in (self.forgetting, self.end_of_text) if report is not None]
        return "\n".join([self.title, *text_table(self.rows()), tokens, *(f"\n{report}" for report in reports)])


def _bits(score: Score) -> str:
    return "–" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"


def _change(score: Score, other: Score) -> str:
    if score.bits_per_byte is None or other.bits_per_byte is None:
        return "–"
    return f"{100 * (score.bits_per_byte / other.bits_per_byte - 1):+.2f} %"


@public
def evaluate(
    model: Reference,
    texts: Mapping[str, str] | Sequence[str] | None = None,
    *,
    against: Reference | None = None,
    tokens: int | str | None = None,
    batch_size: int = 8,
    sequence_length: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    text_key: str | None = None,
    allow_code: bool | None = None,
    say: Say = tell,
) -> Evaluation:
    """Score a model on texts: nats per token, perplexity, bits per byte.

    model: a run, checkpoint, folder, hub id or .gguf file. texts: paths, or a mapping from names to paths; default: the
    held-out texts of the run. against: another model, or `base`, which the run started from; it is scored on the same
    documents. tokens: at most this many of each text; default the run's, else 200k. batch_size: sequences per forward pass; does
    not change the score. sequence_length: default the run's, else 1,024 or what the model can take. device: auto, cpu, cuda or
    cuda:1. precision: auto, fp32, mixed_bf16 or bf16. text_key: JSONL field or Parquet column of the text. allow_code: whether
    the code that a run's `_target_` names may run; None: where training on this machine has run it; False: `--no-code`. say:
    called with each remark.
    """
    model = os.fspath(model)
    named = _named_texts(texts, text_key)
    run = run_of(model)
    if not named and run is None:
        raise ConfigError(f"evaluate {model}: this is not a run, so it has no held-out texts; name at least one text")
    config = config_of_run(run) if run else None
    chosen_by_run = config.evaluate.tokens if config and config.evaluate.tokens != "auto" else DEFAULT_TOKENS
    limit = token_limit(tokens) if tokens is not None else int(chosen_by_run)
    other = None if against is None else base_model_reference(model) if against == "base" else model_reference(against)
    opened = partial(open_model, device=device, allow_code=allow_code, say=say)
    with opened(model_reference(model), precision=precision) as loaded:
        length = sequence_length or _default_sequence_length(loaded, config)
        texts_here, data = _open_texts(loaded, named, config, say)
        chosen = [choose_beginnings(text, limit) for text in texts_here]
        scores = _scores(loaded, texts_here, chosen, batch_size, length)
        if other is None:
            return Evaluation(model, scores, roles=roles_of(texts_here))
        after = _stops(loaded, texts_here, limit, batch_size, length)
        tokenizer, mask = loaded.tokenizer, config.data.document_mask if config else True
        sources = source_ends(data.names, data.stores, tokenizer, mask) if data else []
        ids = named_ids_of_folders(run, loaded.folder, tokenizer.backend.token_to_id)
        chosen_precision = loaded.runner.precision  # said once
    del loaded  # one model in memory at a time
    with opened(other, precision=chosen_precision) as second:
        # The same text, though the other tokenizer may split it differently.
        base_texts, base_chosen = _texts_of_other(second, tokenizer, texts_here, chosen, named)
        base_scores = _scores(second, base_texts, base_chosen, batch_size, length)
        before = _stops(second, base_texts, limit, batch_size, length)
    report = _forgetting(base_scores, scores, texts_here, config)
    ends = audit(tokenizer, sources=sources, before=before, after=after, ids=ids)
    return Evaluation(model, scores, other.reference, base_scores, report, ends, roles_of(texts_here))


def score_base(
    run: Path,
    texts: list[HeldOutText],
    tokenizer: TextTokenizer,
    *,
    tokens: int,
    batch_size: int,
    sequence_length: int,
    device: str,
    precision: str,
    say: Say = tell,
) -> list[Score]:
    """The scores of the model that a run starts from, with its own tokenizer, on what is scored of the run's `texts`.

    tokenizer: of the run.
    For runs that add tokens to the model: the model in training then is not the base, so the base is loaded beside it.
    """
    import torch

    base = open_model(base_model_reference(run), device=device, precision=precision, say=say)
    with torch.random.fork_rng(devices=[]), base as loaded:
        chosen = [choose_beginnings(text, tokens) for text in texts]
        found = _texts_of_other(loaded, tokenizer, texts, chosen, {})
        return _scores(loaded, *found, batch_size, sequence_length)


def _texts_of_other(
    other: LoadedModel,
    tokenizer: TextTokenizer,
    texts: list[HeldOutText],
    chosen: list[list[Beginnings]],
    named: dict[str, SourceConfig],
) -> tuple[list[HeldOutText], list[list[Beginnings]]]:
    """What is scored of `texts`, in the tokens of another model. tokenizer: in whose tokens it was chosen."""
    if other.tokenizer.fingerprint == tokenizer.fingerprint:
        return texts, chosen
    of_parts = [is_of_parts(text, part) for text, part in zip(texts, chosen, strict=True)]
    whole: dict[str, HeldOutText] = {}
    if named and not all(of_parts):  # the data of a run is not prepared a second time
        whole = {text.name: text for text in _open_texts(other, named, None)[0]}
    found = []
    for text, part, in_parts in zip(texts, chosen, of_parts, strict=True):
        if in_parts or text.name not in whole:
            found.append(retokenized(text, part, tokenizer, other.tokenizer))
        else:
            lengths = [store.document_lengths for store, _ in whole[text.name].parts]
            documents = [beginnings.documents for beginnings in part]
            pairs = zip(documents, lengths, strict=True)
            found.append((whole[text.name], [Beginnings(numbers, every[numbers]) for numbers, every in pairs]))
    return [text for text, _ in found], [part for _, part in found]


def _stops(
    loaded: LoadedModel, texts: list[HeldOutText], tokens: int, batch_size: int, sequence_length: int
) -> StopScore | None:
    return measure_stops(
        loaded.runner.logits_at,
        texts,
        loaded.tokenizer.eos_id,
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
    )


def _forgetting(
    before: list[Score], after: list[Score], texts: list[HeldOutText], config: RunConfig | None
) -> ForgettingReport:
    """The report, with the roles of the texts and the cap of the model's run, if it has one."""
    pairs = zip(before, after, strict=True)
    return forgetting_report(
        {new.text: {"before": old.to_mapping(), "after": new.to_mapping()} for old, new in pairs},
        roles=roles_of(texts),
        cap_ratio=config.evaluate.forgetting_cap if config else DEFAULT_CAP_RATIO,
    )


def _scores(
    loaded: LoadedModel, texts: list[HeldOutText], chosen: list[list[Beginnings]], batch_size: int, sequence_length: int
) -> list[Score]:
    check_sequence_length(loaded.model, sequence_length)
    total = sum(part.num_tokens for parts in chosen for part in parts)
    with progress_bar(f"scoring {', '.join(text.name for text in texts)}", total, "tokens") as bar:
        return [
            score_text(
                loaded.runner.token_losses,
                text,
                tokens=total,
                batch_size=batch_size,
                sequence_length=sequence_length,
                eos_id=loaded.tokenizer.eos_id if loaded.tokenizer.append_eos else None,
                decode=loaded.tokenizer.decode_text,
                advance=bar.advance,
                chosen=parts,
            )
            for text, parts in zip(texts, chosen, strict=True)
        ]


def token_limit(tokens: int | str) -> int:
    """The number that `tokens` says, such as 20_000 or "20k". Raises ConfigError."""
    try:
        return parse_count(tokens)
    except ValueError as error:
        raise ConfigError(f"tokens: {error}") from None


def _named_texts(texts: Mapping[str, str] | Sequence[str] | None, text_key: str | None) -> dict[str, SourceConfig]:
    """Sources by name, from a mapping or from paths, each of which may be written `name=path`."""
    if not isinstance(texts, Mapping):
        listed = [texts] if isinstance(texts, (str, os.PathLike)) else texts or []
        pairs = [_name_and_path(os.fspath(text)) for text in listed]
        texts = dict(pairs)
        if len(texts) < len(pairs):
            raise ConfigError(f"two texts have the same name; write NAME=PATH: {', '.join(name for name, _ in pairs)}")
    return {
        name: SourceConfig(path=validation_paths([str(path)]), name=name, text_key=text_key)
        for name, path in texts.items()
    }


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals and not Path(text).exists() else (Path(text).name, text)


def _open_texts(
    loaded: LoadedModel, named: dict[str, SourceConfig], config: RunConfig | None, say: Say = say_nothing
) -> tuple[list[HeldOutText], RunData | None]:
    """The texts in this model's tokens: those named, else the run's held-out texts together with its data.

    say: told of dropped records of those named; of its own data the run has told.
    """
    if not named:
        assert config is not None
        data = open_run_data(config, loaded.tokenizer, say_nothing, generator=open_writer)
        return data.held_out_texts, data
    stores = open_sources(list(named.values()), loaded.tokenizer, say=say)
    pairs = zip(named, stores, strict=True)
    return [HeldOutText(name, [(store, np.arange(store.num_documents))]) for name, store in pairs], None


def _default_sequence_length(loaded: LoadedModel, config: RunConfig | None) -> int:
    if config is not None:
        return config.data.sequence_length
    return min(DEFAULT_SEQUENCE_LENGTH, max_positions(loaded.model) or DEFAULT_SEQUENCE_LENGTH)
