"""Configuration of preparing text into a token store."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import Field

from steep.core.section import Bytes, Section


class PrepareConfig(Section):
    """How text becomes a token store."""

    workers: Optional[int] = Field(default=None, ge=1)
    """Processes that read, encode and write. Default: one per core this process may use."""
    shard_bytes: Bytes = 256 * 2**20
    """Input is cut and grouped into parts of about this size on disk (of a 64th of all input, at least 1 MiB, if that
    is less); each part becomes one shard, prepared by one process."""
    on_bad_record: Literal["skip", "stop"] = "skip"
    """A record that is no document (not UTF-8, not JSON, wrong type, empty): note it in rejected.jsonl, or stop."""
    tokenizer_backend: str = "auto"
    """`auto`: gigatoken (extra `fast`) for sources of 20 MB or more whose first documents it gives the ids of the reference,
    else huggingface, the reference; or one of the two. The ids are the same; a fast one that differs is not used."""
