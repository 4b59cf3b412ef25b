"""Parquet: the text is a string column. Streamed in batches of rows.

In: a file, or some of its row groups. Out: Documents and Rejected. Memory: one row group of the text column.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.sources.document import Location, Record, Span, no_column, text_record
from steep.sources.files import reading

ENDINGS = (".parquet",)
BATCH_ROWS = 1024
LOOKED_AT_ROWS = 20


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the rows of `path`, or of its row groups `span`. Raises DataError for a file or column that does not exist."""
    with _open(path) as file:
        names = file.schema_arrow.names
        column = next((key for key in config.text_keys if key in names), None)
        if column is None:
            first = next(file.iter_batches(LOOKED_AT_ROWS), None)
            rows = [] if first is None else list(zip(*first.to_pydict().values(), strict=True))
            raise DataError(f"{path}: {no_column(names, rows, config.text_keys)}")
        first, last = span or (0, file.metadata.num_row_groups)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        row = sum(sizes[:first])
        bytes_per_row = path.stat().st_size / max(1, sum(sizes))
        start = row
        for batch in file.iter_batches(BATCH_ROWS, row_groups=list(range(first, last)), columns=[column]):
            position = int((row - start + batch.num_rows) * bytes_per_row)
            for value in _values(batch.column(0)):
                row += 1
                yield text_record(value, Location(str(path), row, position), config.max_record_bytes)


def split(path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
    """Runs of row groups of about `part_bytes` on disk each."""
    with _open(path) as file:
        groups = file.metadata.num_row_groups
    parts = max(1, min(groups, round(path.stat().st_size / part_bytes)))
    edges = [groups * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with reading(path), pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter: damaged column names
        raise DataError(f"{path}: is not a complete Parquet file: {error}. Replace or remove the file.") from error


def _values(column: Any) -> list[Any]:
    """The cells as Python values; strings that are not UTF-8 stay bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        return column.cast(pyarrow.large_binary()).to_pylist()
