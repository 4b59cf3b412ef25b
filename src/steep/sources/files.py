"""Opening source files: compressed or not, with every failure named by file.

Out: a buffered binary stream, and how far the file on disk has been read. gzip goes through the standard library, Zstandard
through pyarrow (both read concatenated streams, both notice a truncated one). Memory: buffers of about a megabyte; a file
that expands beyond its limits is refused while it is read.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Optional, Union

from steep.core.errors import DataError

if TYPE_CHECKING:
    from steep.sources.config import SourceConfig

BLOCK_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ALWAYS_EXPANDED_BYTES = 8 * 2**20
"""This much text is read from a compressed file of any size: a small file of repeated lines is not an attack."""


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
def open_binary(path: Path, limits: Optional[SourceConfig] = None) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open `path`, decompressing by its ending; also give a function that returns the bytes read from disk so far.

    limits: holds `max_expansion` and `max_expanded_bytes`; None: no limits.
    Raises DataError for a file that cannot be opened, is damaged, or expands beyond its limits, when reading gets there.
    """
    with reading(path), contextlib.ExitStack() as stack:
        raw: Any = stack.enter_context(open(path, "rb", buffering=BLOCK_BYTES))
        compression = compression_of(path)
        if not compression:
            yield raw, raw.tell
            return
        if compression == ".gz":
            plain: Any = gzip.GzipFile(fileobj=raw, mode="rb")
        else:
            import pyarrow

            plain = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        expanding = _Expanding(stack.enter_context(plain), raw, path, limits)
        yield stack.enter_context(io.BufferedReader(expanding, BLOCK_BYTES)), raw.tell


class _Expanding(io.RawIOBase):
    """A decompressing stream that counts what comes out and refuses a bomb."""

    def __init__(self, plain: Any, raw: IO[bytes], path: Path, limits: Optional[SourceConfig]):
        self._plain, self._raw, self._path, self._limits = plain, raw, path, limits
        self._expanded = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._plain.readinto(buffer)
        self._expanded += count
        limits = self._limits
        if limits is None or not count:
            return count
        most = limits.max_expanded_bytes
        if most is not None and self._expanded > most:
            raise DataError(
                f"{self._path}: holds more than {most:,} bytes of text, which is max_expanded_bytes. "
                "Raise it if the file is meant to hold that much, or remove the file."
            )
        if self._expanded > max(ALWAYS_EXPANDED_BYTES, limits.max_expansion * self._raw.tell()):
            raise DataError(
                f"{self._path}: {self._raw.tell():,} bytes of it became {self._expanded:,}, more than max_expansion "
                f"({limits.max_expansion}) times as many: a decompression bomb? Text grows 3 to 10 times. Remove the file, "
                "or raise max_expansion if the file is genuine."
            )
        return count


def bounded_lines(stream: IO[bytes], limit_bytes: int) -> Iterator[Union[bytes, int]]:
    """The lines of `stream` with their ends; of a line of more than `limit_bytes` only the number of bytes, end included."""
    for line in iter(partial(stream.readline, limit_bytes + 1), b""):
        if len(line) <= limit_bytes or line.endswith(b"\n"):
            yield line
        else:
            yield len(line) + skip_line(stream)


def skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the current line; return the number of bytes read."""
    passed = 0
    for piece in iter(partial(stream.readline, BLOCK_BYTES), b""):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


class LinesBeforeOffset:
    """The number of lines of an uncompressed file before byte `offset`, counted at the first call."""

    def __init__(self, path: Path, offset: int):
        self._path, self.offset = path, offset
        self._count: Optional[int] = None

    def __call__(self) -> int:
        if self._count is None:
            self._count = count_lines(self._path, self.offset)
        return self._count


def count_lines(path: Path, stop: int, start: int = 0) -> int:
    """Line ends in the bytes [start, stop) of an uncompressed file. Raises DataError if it cannot be read."""
    count, left = 0, stop - start
    with reading(path), open(path, "rb") as file:
        file.seek(start)
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count
