"""Which tokenizer backend encodes which source of a `prepare`; decided before any worker starts."""

from __future__ import annotations

from collections.abc import Iterator

from steep.sources.config import SourceConfig
from steep.sources.document import Document
from steep.sources.inputs import load_format
from steep.store.work import HashedInput, source_name
from steep.tokenizer.backend_choice import BackendChooser
from steep.tokenizer.encode import TextTokenizer


def choose_backends(
    inputs: list[HashedInput], sources: list[SourceConfig], tokenizer: TextTokenizer, wanted: str
) -> dict[int, str]:
    """Source number -> the name of its backend, for every source. Raises ConfigError as BackendChooser does, and DataError
    for a file that cannot be read."""
    chooser = BackendChooser(wanted, tokenizer)
    sizes = dict.fromkeys(range(len(sources)), 0)
    for file in inputs:
        sizes[file.source] += file.size
    return {
        number: chooser.choose(source_name(sources[number]), size, _documents(inputs, sources, number))
        for number, size in sizes.items()
    }


def _documents(inputs: list[HashedInput], sources: list[SourceConfig], number: int) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents of a source, from the first on."""
    for file in (file for file in inputs if file.source == number):
        for record in load_format(file.format).read(file.path, sources[number]):
            if isinstance(record, Document):
                yield record.id, record.text
