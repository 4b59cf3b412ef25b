"""Datasets of the Hugging Face hub, or in local folders laid out like them, streamed with the `datasets` library.

In: `hub:NAME:CONFIG:SPLIT`, where NAME is a dataset's id or a local folder; CONFIG and SPLIT may be empty or absent
(the default configuration, the split `train`). Out: Documents and Rejected, in the order of the dataset's files.
A part is some of those files; one file is read by one process. Rows are counted within each file.
Weakness: the content is identified by the dataset's revision and list of files, not by their bytes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from steep.core.errors import DataError, MissingExtraError
from steep.core.fingerprint import fingerprint
from steep.core.hub import SWITCHED_OFF, hub_silence, not_at_hand
from steep.sources.config import SourceConfig
from steep.sources.document import Location, Record, Span, text_record, without_text

ENDINGS = ()
PREFIX = "hub:"


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the rows of a dataset, or of its files `span`. Raises DataError, or MissingExtraError without `datasets`."""
    with _errors(path):
        dataset = _open(path)
        for number in range(*(span or (0, dataset.num_shards))):
            rows = dataset.shard(num_shards=dataset.num_shards, index=number, contiguous=True)
            file = f"{path}, file {number + 1}"
            position = 0
            for row, values in enumerate(rows, 1):
                record = _record(values, config, Location(file, row, position))
                position += len(getattr(record, "text", ""))
                yield record


def split(path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
    """One part per file of the dataset."""
    with _errors(path):
        return list(itertools.pairwise(range(_open(path).num_shards + 1)))


def identity(path: Path) -> tuple[int, str]:
    """(bytes of the split, 0 if the dataset does not say; hash of its name, revision and files)."""
    name, configuration, split = _parse_name(path)
    with _errors(path):
        _require_reachable(name)
        builder = _datasets().load_dataset_builder(name, configuration)
        files = (builder.config.data_files or {}).get(split)
        origin = [list(map(str, entry)) for entry in getattr(files, "origin_metadata", None) or []]
        split_info = (builder.info.splits or {}).get(split)
        names = [Path(file).name for file in files or []]
        content = [builder.config.name, split, names, origin or builder.hash]
        return getattr(split_info, "num_bytes", 0) or 0, fingerprint(content)


def _parse_name(path: Path) -> tuple[str, Optional[str], str]:
    """(name, configuration, split) of `hub:NAME:CONFIG:SPLIT`. Raises DataError."""
    parts = str(path).removeprefix(PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"{path}: write a dataset as hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT.")
    name, configuration, split = [*parts, "", ""][:3]
    return name, configuration or None, split or "train"


def _open(path: Path) -> Any:
    name, configuration, split = _parse_name(path)
    _require_reachable(name)
    return _datasets().load_dataset(name, configuration, split=split, streaming=True)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "hub", "Streaming a dataset (hub:NAME)") from error
    return datasets


def _require_reachable(name: str) -> None:
    """Raise DataError at once for a dataset of a hub that does not answer; `datasets` itself would try for a minute."""
    reason = "" if Path(name).exists() else hub_silence()
    if not reason:
        return
    cache = Path(_datasets().config.HF_DATASETS_CACHE)
    cached = sorted(folder.name.replace("___", "/") for folder in cache.glob("*___*") if folder.is_dir())
    if name not in cached:
        local = "the path of a local folder of text files, or hub:FOLDER for one laid out like a dataset of the hub"
        raise DataError(not_at_hand(name, reason, cache, local, cached, " --repo-type dataset"))
    if reason != SWITCHED_OFF:
        raise DataError(f"{name}: {reason}. The dataset is in the cache: set HF_HUB_OFFLINE=1 to read it from there.")


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn what the library raises for a dataset that cannot be opened or read into a DataError that names it."""
    try:
        yield
    except (OSError, ValueError, _datasets().exceptions.DatasetsError) as error:
        raise DataError(
            f"{path}: cannot be read: {str(error)[:500]}\n"
            "  A dataset is written hub:NAME:CONFIG:SPLIT; NAME is its id on the hub or a local folder."
        ) from error


def _record(values: dict[str, Any], config: SourceConfig, location: Location) -> Record:
    keys = config.text_keys
    key = next((key for key in keys if key in values), None)
    if key is None:
        return without_text(values, keys, location, "columns")
    return text_record(values[key], location, config.max_record_bytes)
