"""Divide the input into work items, each of which becomes one shard.

In: the files of all sources. Out: items fixed by the inputs and `shard_bytes` alone, so that the bytes of the store do not
depend on how many processes write it, or in what order they finish.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, cast

from steep.sources.config import SourceConfig
from steep.sources.document import Span
from steep.sources.formats import RemoteFormat
from steep.sources.inputs import expand_inputs, is_hub, load_format, paths_of
from steep.store.file_hashes import hash_files

MOST_ITEMS_OF_SMALL_INPUT = 64
LEAST_ITEM_BYTES = 2**20
SOURCE_SETTINGS = ("format", "text_key", "document_separator")


@dataclass(frozen=True)
class Part:
    """A file, or a span of one, that is read from start to end."""

    source: int
    path: str
    format: str
    bytes: int
    """Size on disk, for progress."""
    span: Optional[Span] = None
    state: Optional[tuple[int, int]] = None
    """(size in bytes, modification time in nanoseconds) of the file when it was hashed; None for anything that is not a file."""


@dataclass(frozen=True)
class WorkItem:
    """Consecutive parts that become shard `number`."""

    number: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The shard's name."""
        return f"shard_{self.number:05d}"

    @property
    def bytes(self) -> int:
        """Size on disk of all parts."""
        return sum(part.bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """For the pipe to a worker."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> WorkItem:
        """The inverse of `to_json`."""
        pairs = ("span", "state")
        parts = [{**part, **{key: part[key] and tuple(part[key]) for key in pairs}} for part in value["parts"]]
        return cls(value["number"], tuple(Part(**part) for part in parts))


class HashedInput(NamedTuple):
    """One file of a source, with what identifies its content."""

    source: int
    """Number of the source."""
    path: Path
    format: str
    size: int
    """In bytes on disk; 0 where that is not known (hub datasets)."""
    sha256: str
    state: Optional[tuple[int, int]]
    """As `Part.state`."""


def gather_inputs(sources: list[SourceConfig], hash_memory: Optional[Path] = None) -> list[HashedInput]:
    """Every file of all sources, in reading order, hashed: each is read once, at the speed of SHA-256 on all cores.

    hash_memory: where hashes of unchanged files are remembered (`file_hashes`); None reads every file. Raises DataError.
    """
    files = [(number, file) for number, source in enumerate(sources) for file in expand_inputs(source)]
    hashed = iter(hash_files([file.path for _, file in files if not is_hub(file.path)], hash_memory))
    inputs = []
    for number, file in files:
        if is_hub(file.path):
            size, identity = cast(RemoteFormat, load_format(file.format)).identity(file.path)
            inputs.append(HashedInput(number, file.path, file.format, size, identity, None))
        else:
            found = next(hashed)
            state = (found.size, found.modified)
            inputs.append(HashedInput(number, file.path, file.format, found.size, found.sha256, state))
    return inputs


def divide_into_items(inputs: list[HashedInput], sources: list[SourceConfig], shard_bytes: int) -> list[WorkItem]:
    """Group consecutive files into items of about `shard_bytes`. Items are smaller when there is little input, so that all
    cores have work. Large files are cut where their format allows it."""
    small = max(LEAST_ITEM_BYTES, sum(file.size for file in inputs) // MOST_ITEMS_OF_SMALL_INPUT)
    item_bytes = max(1, min(shard_bytes, small))
    groups: list[list[Part]] = []
    filled = item_bytes
    for part in (part for file in inputs for part in _split_file(file, sources[file.source], item_bytes)):
        if filled >= item_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.bytes
    return [WorkItem(number, tuple(group)) for number, group in enumerate(groups)]


def source_name(source: SourceConfig) -> str:
    """A source's name: its own, else the last part of its first path."""
    return source.name or Path(paths_of(source)[0].rstrip("/")).name


def source_settings(source: SourceConfig) -> dict[str, Any]:
    """The part of a source's configuration that decides its documents."""
    settings = {key: getattr(source, key) for key in SOURCE_SETTINGS}
    if source.max_record_bytes != SourceConfig.model_fields["max_record_bytes"].default:
        settings["max_record_bytes"] = source.max_record_bytes
    return settings


def _split_file(file: HashedInput, source: SourceConfig, item_bytes: int) -> list[Part]:
    size = file.size
    is_large = size > item_bytes or file.state is None
    spans = load_format(file.format).split(file.path, item_bytes, source) if is_large else []
    if file.state is None and not size:
        size = item_bytes * len(spans)  # nothing is known: each file of the dataset is an item
    if len(spans) < 2:
        return [Part(file.source, str(file.path), file.format, size, None, file.state)]
    units = spans[-1][1]
    edges = [(size * start // units, size * stop // units) for start, stop in spans]
    return [
        Part(file.source, str(file.path), file.format, stop - start, span, file.state)
        for span, (start, stop) in zip(spans, edges, strict=True)
    ]
