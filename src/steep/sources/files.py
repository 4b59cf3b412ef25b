"""Opening source files: compressed or not, with every failure named by file.

Out: a buffered binary stream and how far the file on disk has been read. gzip goes through the standard library, Zstandard
through pyarrow (both read concatenated streams, both notice a truncated one). Memory: buffers of about a megabyte.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from steep.core.errors import DataError

BLOCK_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def compression_of(path: Path) -> str:
    """`.gz`, `.zst` or an empty string."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def content_suffix(path: Path) -> str:
    """The ending that tells the format: `.jsonl` for both a.jsonl and a.jsonl.gz."""
    return (path.with_suffix("") if compression_of(path) else path).suffix.lower()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong while reading `path` into a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        # pyarrow raises OSError for damaged Zstandard, gzip raises EOFError for a truncated file.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read: {reason}. Replace or remove the file.") from error


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open `path`, decompressing by its ending; also give a function that tells the bytes read from disk so far.

    Raises DataError for a file that cannot be opened, or is damaged, at the point where the damage is met.
    """
    with reading(path), contextlib.ExitStack() as stack:
        raw: Any = stack.enter_context(open(path, "rb"))
        compression = compression_of(path)
        if compression == ".gz":
            stream: Any = stack.enter_context(gzip.GzipFile(fileobj=raw, mode="rb"))
        elif compression == ".zst":
            import pyarrow

            plain = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
            stream = stack.enter_context(io.BufferedReader(plain, BLOCK_BYTES))
        else:
            stream = raw
        yield stream, raw.tell


def skip_byte_order_mark(stream: IO[bytes]) -> bytes:
    """Read the first three bytes of `stream`; returns them unless they are a UTF-8 byte order mark."""
    first = stream.read(len(BYTE_ORDER_MARK))
    return b"" if first == BYTE_ORDER_MARK else first
