"""Configuration of the data section: sources, sequences and their order."""

from __future__ import annotations

from typing import Literal, Optional, Union

from pydantic import Field, model_validator

from steep.core.section import Section
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig


class ValidationConfig(SourceConfig):
    """A held-out text: a path of its own, or a share of the training documents."""

    path: Optional[Union[str, list[str]]] = None  # type: ignore[assignment]
    """Held-out documents. Give this or `share`."""
    share: Optional[float] = Field(default=None, gt=0, lt=1)
    """Hold out this share of the training documents, chosen by the hash of each document's content, so that the
    choice does not change when data is added, reordered or resharded."""

    @model_validator(mode="after")
    def _path_or_share(self) -> ValidationConfig:
        if (self.path is None) == (self.share is None):
            raise ValueError("give either path (held-out documents) or share (a part of the training documents)")
        return self


class DataConfig(Section):
    """What is trained on and what is held out."""

    sequence_length: int = Field(default=1024, ge=2)
    """Tokens per sequence."""
    train: list[SourceConfig] = Field(min_length=1)
    """Sources of training documents; each epoch holds every sequence of every source once."""
    validation: dict[str, ValidationConfig] = Field(default_factory=dict)
    """Held-out texts by name, e.g. `domain` and `general`. At most one may use `share`."""
    order: Literal["native"] = "native"
    """How sequence i is chosen. `native`: a Feistel permutation per seed, source and epoch."""
    packing: Literal["concat"] = "concat"
    """How documents fill sequences. `concat`: one after the other, cut where the sequence is full."""
    document_mask: bool = True
    """Attention stays inside a document and positions restart with it. False: documents in one sequence see each other."""
    prepare: PrepareConfig = PrepareConfig()
    """How text that is not yet a token store is prepared."""
    cache_directory: Optional[str] = None
    """Where prepared text is kept. Default: $STEEP_CACHE, else ~/.cache/steep."""

    @model_validator(mode="after")
    def _one_share(self) -> DataConfig:
        shares = [name for name, validation in self.validation.items() if validation.share is not None]
        if len(shares) > 1:
            raise ValueError(f"validation: {' and '.join(shares)} both hold out a share; only one can")
        return self
