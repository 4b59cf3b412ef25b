"""Configuration of one source of documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Optional, Union

from pydantic import Field

from steep.core.plugins import plugin_constant, plugin_names
from steep.core.section import Bytes, Section

TEXT_FORMATS = tuple(
    name for name in plugin_names("steep.sources.formats") if plugin_constant("steep.sources.formats", name, "ENDINGS")
)
"""The formats of text files. What has no file ending, such as a dataset of the hub, is named by its path, `hub:NAME`."""
FORMATS = ("auto", *TEXT_FORMATS, "store", *plugin_names("steep.store.formats"))

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[FORMATS]


class SourceConfig(Section):
    """Where documents come from."""

    path: Union[str, list[str]]
    """A file, folder, glob or list of them: text, code, .jsonl, .json, .csv, .tsv, each also .gz and .zst, .parquet; a token
    store, used as it is; or `hub:NAME:CONFIG:SPLIT`, a dataset that the `datasets` library streams (`:CONFIG:SPLIT` may be left
    out)."""
    name: Optional[str] = None
    """How reports call this source. Default: the last part of the path."""
    format: FormatName = "auto"
    """`auto` decides by each file's ending; a folder with a manifest.json is a token store, and token files of other tools
    are recognized by their first bytes. `code`, `csv`, `json`, `jsonl`, `parquet`, `plain_text`: text. `store`: a token
    store of any kind; the others: token files of that tool."""
    text_key: Optional[str] = None
    """Field of the records (JSONL, JSON) or column (CSV, Parquet) that holds the text. Default: `text`, else `content`."""
    document_separator: Optional[str] = Field(default=None, min_length=1)
    """Plain text only: split each file into documents at this string; `blank_lines` splits at empty lines.
    Default: one document per file."""
    max_record_bytes: Bytes = 64 * 2**20
    """A longer record (JSONL line, row, file of text or code, cell) is rejected as `too long`, so that memory is bounded."""
    max_expansion: int = Field(default=200, ge=1)
    """A .gz or .zst file that grows more than this many times while it is read is refused as a decompression bomb. Text
    grows 3 to 10 times; the first 8 MiB are always read."""
    max_expanded_bytes: Optional[Bytes] = None
    """A .gz or .zst file with more text than this is refused. Default: no limit but `max_expansion`."""

    @property
    def text_keys(self) -> tuple[str, ...]:
        """The fields that may hold the text; the first that a record has is taken."""
        return ("text", "content") if self.text_key is None else (self.text_key,)
