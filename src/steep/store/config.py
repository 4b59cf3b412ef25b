"""Configuration of preparing text into a token store."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import Field

from steep.core.section import Bytes, Count, Section


class PrepareConfig(Section):
    """How text becomes a token store."""

    workers: Optional[int] = Field(default=None, ge=1)
    """Processes that read, encode and write. Default: one per core this process may use. Does not change what is written."""
    tokenizer_backend: str = "auto"
    """`auto`: gigatoken (extra `fast`) for sources of 20 MB or more if it gives the reference's ids for their first
    documents, else huggingface, the reference; or one of the two. A fast backend that gives other ids is not used."""
    shard_bytes: Bytes = 256 * 2**20
    """Input is cut and grouped into parts of about this size on disk (of a 64th of all input, at least 1 MiB, if that
    is less); each part is prepared by one process and, unless `shard_tokens` is given, becomes one shard."""
    shard_tokens: Optional[Count] = Field(default=None, ge=1)
    """Shards of at most this many tokens, in whole documents. A longer document gets its own shard."""
    on_bad_record: Literal["skip", "stop"] = "skip"
    """`skip`: note records that are not documents (not UTF-8, not JSON, wrong type, empty) in rejected.jsonl. `stop`: end."""
    max_tokens: Optional[Count] = Field(default=None, ge=1)
    """Stop after the document, in input order, that brings the store to this many tokens. In a run: for each source."""
    min_tokens: Optional[Count] = Field(default=None, ge=1)
    """Drop documents of fewer tokens, EOS and BOS included."""
    max_tokens_per_document: Optional[Count] = Field(default=None, ge=1)
    """Drop documents of more tokens. Documents are never cut."""
    dedup: Optional[Literal["exact", "minhash"]] = None
    """Keep the first of documents that are equal (`exact`) or nearly equal (`minhash`: MinHash over runs of 5 words, at 0.8).
    Default: equal ones are only counted."""
    check_against: Optional[list[str]] = None
    """Evaluation texts (files, folders, globs): training documents that share a run of 13 words with one are listed in
    contaminated.jsonl and counted."""
    drop_contaminated: bool = False
    """Drop what `check_against` finds."""

    @property
    def changes_documents(self) -> list[str]:
        """The settings given that decide which records become documents."""
        names = ["max_tokens", "min_tokens", "max_tokens_per_document", "dedup", "check_against"]
        given = [name for name in names if getattr(self, name) is not None]
        return [*given, *(["on_bad_record"] if self.on_bad_record == "stop" else [])]

    @property
    def chooses(self) -> bool:
        """Whether documents are chosen, or shards formed, after all have been read."""
        limits = (self.max_tokens, self.min_tokens, self.max_tokens_per_document, self.dedup, self.shard_tokens)
        return any(limit is not None for limit in limits) or (self.drop_contaminated and bool(self.check_against))
