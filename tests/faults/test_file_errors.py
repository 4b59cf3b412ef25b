"""What the file system refuses is a message that names the place and the remedy; nothing is left out because of it."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from steep.cli.main import run
from steep.core.arrays import write_array
from steep.core.cache_directory import default_cache_directory
from steep.core.errors import DataError, FileError, MissingExtraError
from steep.core.file_errors import explain_file_error
from steep.core.public import public
from steep.sources.config import SourceConfig
from steep.sources.inputs import expand_inputs, known_endings
from steep.store.cache import cached_store, store_paths
from steep.store.config import PrepareConfig
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.open import load_tokenizer

NOBODY = 65534


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder with a text, and beside it a folder with another that nobody but root may list."""
    with tempfile.TemporaryDirectory(prefix="steep-") as name:
        folder = Path(name)
        (folder / "inner" / "closed").mkdir(parents=True)
        (folder / "open").mkdir()
        (folder / "open" / "a.txt").write_text("a")
        (folder / "inner" / "closed" / "b.txt").write_text("b")
        folder.chmod(0o755)
        (folder / "inner" / "closed").chmod(0)
        yield folder
        (folder / "inner" / "closed").chmod(0o700)


def as_nobody(path: str) -> str:
    """What a user without rights is told of a source: the user of this test, unless that is root, whom no right stops."""
    known_endings()  # loads the formats while it may
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            source = SourceConfig(path=path)
            answer = str(store_paths(source) or [file.path.name for file in expand_inputs(source)])
        except DataError as error:
            answer = f"refused: {error}"
        except BaseException as error:  # noqa: BLE001  (the test compares it)
            answer = repr(error)
        os.write(send, answer.encode())
        os._exit(0)
    os.close(send)
    with open(receive, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.parametrize("what", ["", "inner/closed", "**/*.txt", "*/*/*.txt", "inner"])
def test_a_folder_that_cannot_be_listed_is_named_and_never_passed_over(what: str, closed: Path) -> None:
    output = as_nobody(str(closed / what))
    assert output.startswith(f"refused: {closed}/inner/closed: the folder cannot be read: Permission denied")


def test_a_file_in_it_is_named_and_what_is_beside_it_can_be_read(closed: Path) -> None:
    assert "b.txt: Permission denied. Change its permissions" in as_nobody(str(closed / "inner" / "closed" / "b.txt"))
    assert as_nobody(str(closed / "open" / "*.txt")) == "['a.txt']"


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache", "/dev/null"])
def test_a_cache_that_cannot_be_written_names_its_key(
    place: str, tiny_tokenizer_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.txt").write_text("some text")
    tokenizer = load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))
    with pytest.raises(DataError, match=r"prepared text cannot be kept there.*data\.cache_directory.*STEEP_CACHE"):
        cached_store(SourceConfig(path=str(tmp_path / "a.txt")), tokenizer, PrepareConfig(), tmp_path / place)


def test_a_user_without_a_home_is_told_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEEP_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(FileError, match="STEEP_CACHE"):
        default_cache_directory()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_array_on_a_full_disk_fails_with_its_reason() -> None:
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb") as file:
        write_array(file, np.arange(100_000))
    assert caught.value.errno == errno.ENOSPC


def test_what_numpy_reads_is_what_was_written(tmp_path: Path) -> None:
    for array in (
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.zeros(0),
        np.zeros(3, dtype=[("a", "<i8"), ("b", "<u2")]),
    ):
        with open(tmp_path / "a.npy", "wb") as file:
            write_array(file, array)
        with open(tmp_path / "b.npy", "wb") as file:
            np.save(file, array)
        assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "x/a: no space left on the device. Free some space"),
        (errno.EACCES, "x/a: permission denied. Change its permissions"),
        (errno.EROFS, "x/a: read-only file system. Choose a folder that can be written"),
        (errno.ENOENT, "x/a: no such file or directory. Check the path"),
        (errno.ENAMETOOLONG, "x/a: file name too long. Choose another path"),
        (errno.EMFILE, "x/a: too many open files. Raise the limit"),
    ],
)
def test_a_function_of_steep_raises_what_the_system_refuses_as_an_error_for_a_person(number: int, message: str) -> None:
    @public
    def refused(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    for path in ("x/a", "x/.partial-123-a"):  # the name it would have had
        with pytest.raises(FileError, match=message):
            refused(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_known_from_what_libraries_say_of_it() -> None:
    with pytest.raises(OSError, match="requested") as caught, open("/dev/full", "wb") as file:
        np.arange(100_000).tofile(file)
    assert str(explain_file_error(caught.value)).startswith("a file: no space left on the device. Free some space")
    rust = SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )  # as it words it
    assert "no space left" in str(explain_file_error(rust))


def test_what_does_not_come_from_the_file_system_stays_as_it_is() -> None:
    others = [
        OSError("Can't load the model"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        BrokenPipeError(errno.EPIPE, "x"),
        OSError(errno.EINVAL, "invalid", "x"),
        FileNotFoundError(errno.ENOENT, "without a name"),
    ]
    assert [explain_file_error(error) for error in others] == [None] * len(others)


def test_a_command_ends_with_the_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "fertility", "x" * 300, "--tokenizer", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_without_the_package_gguf_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for reference in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(MissingExtraError, match=r"tokenizer of model\.gguf needs .*steep\[gguf\]"):
            load_hf_tokenizer(str(reference))
