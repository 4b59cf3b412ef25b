"""Configuration of one source of documents."""

from __future__ import annotations

from typing import Literal, Optional, Union

from pydantic import Field

from steep.core.section import Section


class SourceConfig(Section):
    """Where documents come from."""

    path: Union[str, list[str]]
    """A file, folder, glob or list of them: text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; or a token store, used as it is."""
    name: Optional[str] = None
    """How reports call this source. Default: the last part of the path."""
    format: Literal["auto", "plain_text", "jsonl", "parquet", "store"] = "auto"
    """`auto` decides by each file's ending; a folder with a manifest.json is a token store."""
    text_key: Optional[str] = None
    """JSONL field or Parquet column that holds the text. Default: `text`, else `content`."""
    document_separator: Optional[str] = Field(default=None, min_length=1)
    """Plain text only: split each file into documents at this string; `blank_lines` splits at empty lines.
    Default: one document per file."""
