"""Configuration of the data section: sources, sequences and their order."""

from __future__ import annotations

from typing import Literal, Optional, Union

from pydantic import Field, model_validator

from steep.core.section import Count, Section
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig


class ValidationConfig(SourceConfig):
    """A held-out text: its own path, or a share of the training documents."""

    path: Optional[Union[str, list[str]]] = None  # type: ignore[assignment]
    """Held-out documents; `auto` is text that the base model writes, whose loss shows how far the model has moved. Give this or
    `share`."""
    generate_tokens: Count = Field(default=20_000, ge=1)
    """Path `auto`: how many tokens the base model writes, in whole documents."""
    share: Optional[float] = Field(default=None, gt=0, lt=1)
    """Hold out this share of every training source, as a text of its own: named after its source where there are several, with
    the role of its source. It follows from the content of the documents, not from their order or the length of the run."""
    share_of: Literal["tokens", "documents"] = "tokens"
    """`tokens`: the share is met in tokens; where documents are few or long, blocks of them are held out, and what stands around
    a block is trained on as separate documents. `documents`: each document by its hash alone, all sources in one text, as before
    this key: the share is met on average, text that is added moves no document, and few documents may give none."""
    role: Optional[Literal["domain", "general"]] = None
    """Its role in the forgetting report: `domain`, text the run is to learn, or `general`, text on which the model should stay as
    good as it was. Default: general where the name begins with `general`, and for the share of a source with role replay, else
    domain."""

    @model_validator(mode="after")
    def _path_or_share(self) -> ValidationConfig:
        if (self.path is None) == (self.share is None):
            raise ValueError("give either path (held-out documents) or share (a part of the training documents)")
        return self


class TrainSourceConfig(SourceConfig):
    """A source of training documents, and how much of the run it gives. Path `auto` with role `replay` is text that the base
    model writes itself, before the first step."""

    weight: Optional[float] = Field(default=None, ge=0)
    """Share of the run's tokens, in proportion to the other weights; 0 waits for a phase. Give all sources one or none: without
    weights each epoch holds every sequence of every source once."""
    role: Literal["train", "replay"] = "train"
    """`replay`: text that keeps the model from forgetting; reports show it separately, and no epoch waits for it."""
    generate_tokens: Count = Field(default=100_000, ge=1)
    """Path `auto`: how many tokens the base model writes, in whole documents. A run that takes more repeats them."""
    stream: bool = False
    """Tokenize the text while training instead of preparing it first. Documents then keep the order of their files, a resumed run
    rereads the files that the last checkpoint stood in, and the run needs its length in train.tokens or train.steps."""
    max_epochs: Optional[float] = Field(default=None, gt=0)
    """A run that would repeat this source more often than this is refused before it starts."""


class PhaseConfig(Section):
    """A change of the weights during the run."""

    from_tokens: Count = Field(ge=1)
    """Where it begins, in tokens of the run, rounded up to a whole sequence."""
    weights: dict[str, float] = Field(min_length=1)
    """New weights by source name. Sources that are not named keep theirs; 0 drops a source."""


class DataConfig(Section):
    """What is trained on and what is held out."""

    sequence_length: int = Field(default=1024, ge=2)
    """Tokens per sequence."""
    train: list[TrainSourceConfig] = Field(min_length=1)
    """Sources of training documents, with their weights."""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Changes of the weights at token counts. What comes before a phase does not depend on it, so phases, and sources of
    weight 0, may be added to a run that has started."""
    validation: dict[str, ValidationConfig] = Field(default_factory=dict)
    """Held-out texts by name, e.g. `domain` and `general`. At most one may use `share`."""
    order: Literal["native", "megatron"] = "native"
    """How sequence i is chosen. `native`: exact shares, and a permutation per seed, source and epoch. `megatron`: what
    megatron-core's GPTDataset and BlendedDataset give for the same files, seed and length of the run, sample for sample."""
    split: Optional[str] = None
    """Order `megatron`: shares of training, validation and test, such as "0.99, 0.01, 0.00". Left out where a JSON blend names
    the datasets of every split."""
    num_val_samples: Optional[Count] = None
    """Order `megatron`: sequences of the validation split that are scored, at most. Default: evaluate.tokens."""
    index_cache_directory: Optional[str] = None
    """Order `megatron`: a folder for Megatron's index files; those that Megatron wrote are read, ours can be read by it."""
    packing: Literal["best_fit", "concat"] = "best_fit"
    """How documents fill sequences. `best_fit`: documents whole where they fit, cut where they are longer than a sequence; at
    most two sequences per 20,000 documents are padding. `concat`: one after the other, cut where the sequence is full. Held-out
    texts are always laid out by `concat`."""
    align_to_bos: bool = False
    """Every sequence starts at the start of a document. What documents have beyond `sequence_length` is left out, and counted."""
    document_mask: bool = True
    """Attention stays inside a document and positions restart with it. False: documents in one sequence see each other."""
    prepare: PrepareConfig = PrepareConfig()
    """How text that is not yet a token store is prepared."""
    cache_directory: Optional[str] = None
    """Where prepared text is kept. Default: $STEEP_CACHE, else ~/.cache/steep."""

    def _refuse_in_megatron_order(self) -> None:
        """Raise ValueError for settings that only the native order has."""
        native = {
            "phases": self.phases,
            "align_to_bos": self.align_to_bos,
            "train: stream": any(source.stream for source in self.train),
            "train: max_epochs": any(source.max_epochs is not None for source in self.train),
            "validation: share": any(validation.share is not None for validation in self.validation.values()),
        }
        given = [name for name, value in native.items() if value]
        if given:
            held = "; data.split holds out the validation share" if "validation: share" in given else ""
            raise ValueError(f"order megatron has no {', '.join(given)}; these belong to the native order{held}")

    @model_validator(mode="after")
    def _fits_together(self) -> DataConfig:
        shares = [name for name, validation in self.validation.items() if validation.share is not None]
        if len(shares) > 1:
            raise ValueError(f"validation: {' and '.join(shares)} both hold out a share; only one can")
        given = [source.weight for source in self.train]
        if any(weight is None for weight in given) and any(weight is not None for weight in given):
            raise ValueError("train: some sources have a weight and some have none; give all or none one")
        if given[0] is not None and not any(given):
            raise ValueError("train: every weight is 0; one must be above 0")
        streams = [source for source in self.train if source.stream]
        if streams and len(self.train) > 1 and given[0] is None:
            raise ValueError("train: with stream, whose size is not known, every source needs a weight")
        if any(source.max_epochs is not None for source in streams):
            raise ValueError("train: max_epochs needs prepared text; the size of a stream is not known")
        if streams and shares:
            raise ValueError(
                "validation: a share is chosen from prepared text; with stream, name held-out files by path"
            )
        if streams and self.prepare.changes_documents:
            raise ValueError(
                f"prepare.{self.prepare.changes_documents[0]} applies to prepared text only and has no effect on a stream; "
                "prepare the text with `steep prepare` first, or remove it"
            )
        if streams and self.align_to_bos:
            raise ValueError("align_to_bos needs prepared text; a stream is laid end to end")
        if self.order == "megatron":
            self._refuse_in_megatron_order()
        elif self.split is not None or self.num_val_samples is not None or self.index_cache_directory is not None:
            raise ValueError("split, num_val_samples and index_cache_directory belong to order megatron")
        starts = [phase.from_tokens for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases: from_tokens must rise; given are {', '.join(map(str, starts))}")
        if self.align_to_bos and self.packing == "concat":
            raise ValueError("align_to_bos needs packing best_fit; concat cuts documents wherever a sequence is full")
        return self
