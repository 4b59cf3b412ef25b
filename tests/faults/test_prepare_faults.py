"""`prepare` killed, starved or disturbed: it continues to the same bytes, or says what happened; it never hangs."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig
from steep.store.prepare import prepare_sources
from steep.store.reader import is_store, open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.open import load_tokenizer

SHARD_BYTES = 120_000

# No main guard, on purpose: workers must not import the caller's main module.
PROGRAM = f"""
import json, os, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has its children ignore it
from steep.sources.config import SourceConfig
from steep.store.config import PrepareConfig
from steep.store.prepare import prepare_sources
from steep.tokenizer.encode import TextTokenizer

source, tokenizer, out, workers, mode = sys.argv[1:]

def progress(*call):
    print("progress", *call, flush=True)
    if mode == "pause":  # until the test says something: the workers end their items and wait for more
        sys.stdin.readline()

config = PrepareConfig(workers=int(workers), shard_bytes={SHARD_BYTES}, **json.loads(os.environ.get("CHANGES", "{{}}")))
print("started", flush=True)
sources, tokenizer = [SourceConfig(path=source)], TextTokenizer.load(pathlib.Path(tokenizer))
print(prepare_sources(sources, tokenizer, pathlib.Path(out), config, progress, wait=mode == "wait"))
"""

KILLER = """
import os, signal
at, real, count = int(os.environ["KILL_AT"]), os.replace, 0
def replace(*arguments):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
os.replace = replace
"""
RENAMES_BEFORE_SHARDS, RENAMES_PER_SHARD = 3, 5  # plan, two of the tokenizer; .bin, .idx, sidecar, rejected, entry


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    return load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 0.9 MB of JSONL with bad lines: eight shards, about half a second of work."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [json.dumps({"text": f"{copy} {text}"}) for copy in range(2) for text in documents] + ["{", "[]", ""]
    random.Random(1).shuffle(lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare_sources([SourceConfig(path=str(corpus))], tokenizer, out, PrepareConfig(workers=1, shard_bytes=SHARD_BYTES))
    return folder_hashes(out)


def folder_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(corpus: Path, tokenizer_folder: Path, out: Path, workers: int = 2, mode: str = "go") -> subprocess.Popen[str]:
    arguments = [str(corpus), str(tokenizer_folder), str(out), str(workers), mode]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], text=True, **pipes)


def run_killed(source: Path, tokenizer_folder: Path, out: Path, kill_at: int, changes: str = "{}") -> int:
    """Run `prepare` in one process that kills itself before its `kill_at`-th rename; returns its exit status."""
    arguments = [str(source), str(tokenizer_folder), str(out), "1", "go"]
    environment = {**os.environ, "KILL_AT": str(kill_at), "CHANGES": changes}
    program = [sys.executable, "-c", KILLER + PROGRAM, *arguments]
    return subprocess.run(program, capture_output=True, env=environment, timeout=60).returncode


def interrupted_store(corpus: Path, tokenizer_folder: Path, out: Path, shards: int = 1) -> None:
    """An unfinished folder with so many finished shards and half of another."""
    status = run_killed(corpus, tokenizer_folder, out, RENAMES_BEFORE_SHARDS + RENAMES_PER_SHARD * shards + 2)
    assert status == -signal.SIGKILL
    assert len(list(out.glob(".prepare/shard_?????.json"))) == shards


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return
    raise AssertionError(f"ended before {word!r}: {process.communicate()[1]}")


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended while we looked
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, f"still running: {pids}"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(
    corpus: Path,
    tokenizer_folder: Path,
    tokenizer: TextTokenizer,
    undisturbed: dict[str, str],
    tmp_path: Path,
    workers: int,
) -> None:
    random_delay = random.Random(workers)
    out = tmp_path / "out"
    unfinished = 0
    for attempt in range(3):
        process = start(corpus, tokenizer_folder, out, workers)
        wait_for(process, "started")
        if attempt == 0:  # as soon as there is a plan: a fast machine may be done before any other instant
            while not (out / ".prepare" / "plan.json").exists() and process.poll() is None:
                time.sleep(0.001)
        else:
            time.sleep(random_delay.uniform(0, 0.6))
        workers_of_it = children_of(process.pid)
        process.kill()
        process.communicate()
        wait_until_gone(workers_of_it)  # orphaned workers leave by themselves
        if out.exists() and not (out / "manifest.json").exists():
            unfinished += 1
            with pytest.raises(DataError, match="unfinished"):
                open_store(out)
    config = PrepareConfig(workers=2, shard_bytes=SHARD_BYTES)
    prepare_sources([SourceConfig(path=str(corpus))], tokenizer, out, config)
    assert unfinished > 0
    assert folder_hashes(out) == undisturbed
    assert list(out.rglob(".*")) == []
    open_store(out).verify()


def test_killed_before_every_single_rename_it_ends_with_the_same_bytes(
    documents: list[str], tokenizer: TextTokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Every file appears by a rename, so this is every state of the folder that a kill can leave."""
    source = tmp_path / "small.jsonl"
    lines = [json.dumps({"text": text}) for text in documents[:12]]
    source.write_text("\n".join([*lines, "{"]), encoding="utf-8")
    config = PrepareConfig(workers=1, shard_bytes=SHARD_BYTES)
    prepare_sources([SourceConfig(path=str(source))], tokenizer, tmp_path / "whole", config)
    expected = folder_hashes(tmp_path / "whole")
    for kill_at in range(1, 40):
        out = tmp_path / f"out{kill_at}"
        status = run_killed(source, tokenizer_folder, out, kill_at)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        prepare_sources([SourceConfig(path=str(source))], tokenizer, out, config)
        assert folder_hashes(out) == expected
    assert kill_at == RENAMES_BEFORE_SHARDS + RENAMES_PER_SHARD + 2 + 1  # rejected.jsonl, manifest; then none is left


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 12_000, "shard_tokens": 3000},
        {"dedup": "minhash", "min_tokens": 200, "check_against": ["EVALUATION"]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_killed_before_every_rename_of_a_choice_it_ends_with_the_same_bytes(
    documents: list[str], tokenizer: TextTokenizer, tokenizer_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source, evaluation = tmp_path / "small.jsonl", tmp_path / "evaluation.txt"
    lines = [json.dumps({"text": text}) for text in documents[:12] * 2]
    source.write_text("\n".join([*lines, "{"]), encoding="utf-8")
    evaluation.write_text(documents[3])
    if "check_against" in changes:
        changes = {**changes, "check_against": [str(evaluation)]}
    config = PrepareConfig(workers=1, shard_bytes=SHARD_BYTES, **changes)
    prepare_sources([SourceConfig(path=str(source))], tokenizer, tmp_path / "whole", config)
    expected = folder_hashes(tmp_path / "whole")
    for kill_at in range(1, 60):
        out = tmp_path / f"out{kill_at}"
        status = run_killed(source, tokenizer_folder, out, kill_at, json.dumps(changes))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert not is_store(out) or (out / "manifest.json").exists() or (out / ".prepare").exists()
        prepare_sources([SourceConfig(path=str(source))], tokenizer, out, config)
        assert folder_hashes(out) == expected
    assert kill_at > 12


def test_killed_right_after_the_manifest_the_store_is_whole_and_tidied(
    corpus: Path, tokenizer: TextTokenizer, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out, config = tmp_path / "out", PrepareConfig(workers=1, shard_bytes=SHARD_BYTES)
    prepare_sources([SourceConfig(path=str(corpus))], tokenizer, out, config)
    (out / ".prepare").mkdir()
    for name in ("plan.json", "lock", "shard_00000.json"):
        (out / ".prepare" / name).write_text("{}")
    open_store(out).verify()
    assert prepare_sources([SourceConfig(path=str(corpus))], tokenizer, out, config).already_there
    assert folder_hashes(out) == undisturbed


def test_finished_shards_are_kept(
    corpus: Path, tokenizer_folder: Path, tokenizer: TextTokenizer, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted_store(corpus, tokenizer_folder, out, shards=3)
    written = {f"shard_0000{n}.bin": (out / f"shard_0000{n}.bin").stat().st_mtime_ns for n in range(3)}
    result = prepare_sources(
        [SourceConfig(path=str(corpus))], tokenizer, out, PrepareConfig(workers=1, shard_bytes=SHARD_BYTES)
    )
    assert result.shards_continued == 3
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written
    assert folder_hashes(out) == undisturbed


def test_an_unfinished_folder_refuses_other_settings_by_name(
    corpus: Path, tokenizer_folder: Path, tokenizer: TextTokenizer, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted_store(corpus, tokenizer_folder, out)
    assert is_store(out)
    source = SourceConfig(path=str(corpus))
    with pytest.raises(DataError, match=rf"unfinished(?s:.*)shard_bytes: {SHARD_BYTES} there, 5000000 now"):
        prepare_sources([source], tokenizer, out, PrepareConfig(shard_bytes=5_000_000))
    with pytest.raises(DataError, match=r"'text_key': None(?s:.*)'text_key': 'body'"):
        prepare_sources(
            [SourceConfig(path=str(corpus), text_key="body")], tokenizer, out, PrepareConfig(shard_bytes=SHARD_BYTES)
        )
    prepare_sources([source], tokenizer, out, PrepareConfig(workers=1, shard_bytes=SHARD_BYTES), overwrite=True)
    assert folder_hashes(out) == undisturbed


def test_a_finished_shard_that_was_cut_short_is_made_again(
    corpus: Path, tokenizer_folder: Path, tokenizer: TextTokenizer, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted_store(corpus, tokenizer_folder, out)
    name = next(out.glob(".prepare/shard_*.json")).stem
    with (out / f"{name}.bin").open("r+b") as file:
        file.truncate(10)
    prepare_sources([SourceConfig(path=str(corpus))], tokenizer, out, PrepareConfig(workers=1, shard_bytes=SHARD_BYTES))
    assert folder_hashes(out) == undisturbed


def test_ctrl_c_stops_promptly_and_leaves_a_folder_that_continues(
    corpus: Path, tokenizer_folder: Path, tokenizer: TextTokenizer, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(corpus, tokenizer_folder, out, mode="pause")
    wait_for(process, "progress")
    workers = children_of(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    wait_until_gone(workers)
    prepare_sources([SourceConfig(path=str(corpus))], tokenizer, out, PrepareConfig(workers=1, shard_bytes=SHARD_BYTES))
    assert folder_hashes(out) == undisturbed


def test_a_killed_worker_is_an_error_not_a_hang(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    process = start(corpus, tokenizer_folder, tmp_path / "out", mode="pause")
    wait_for(process, "progress")
    victim, other = children_of(process.pid)
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate("\n" * 1000, timeout=20)
    assert process.returncode == 1
    assert "DataError: a worker process was killed by SIGKILL while it prepared" in errors
    assert "fewer workers" in errors
    wait_until_gone([other])


def test_two_at_once_end_with_one_good_store(
    corpus: Path, tokenizer_folder: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    processes = [start(corpus, tokenizer_folder, out, 1, "wait") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("already there" in output for output in outputs) == 1
    assert folder_hashes(out) == undisturbed


def test_the_second_of_two_that_do_not_wait_names_the_first(
    corpus: Path, tokenizer_folder: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    process = start(corpus, tokenizer_folder, tmp_path / "out", mode="pause")
    wait_for(process, "progress")
    with pytest.raises(DataError, match=f"process {process.pid} is preparing it now"):
        prepare_sources(
            [SourceConfig(path=str(corpus))], tokenizer, tmp_path / "out", PrepareConfig(shard_bytes=SHARD_BYTES)
        )
    process.kill()
    process.communicate()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_space_is_said_and_can_be_continued(
    corpus: Path,
    tokenizer_folder: Path,
    tokenizer: TextTokenizer,
    undisturbed: dict[str, str],
    tmp_path: Path,
    workers: int,
) -> None:
    out = tmp_path / "out"
    arguments = [str(corpus), str(tokenizer_folder), str(out), str(workers), "go"]
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert finished.returncode == 1
    assert "DataError" in finished.stderr
    assert "the file would be larger than this system allows" in finished.stderr
    assert list(out.glob("shard_*.bin")) == []
    prepare_sources([SourceConfig(path=str(corpus))], tokenizer, out, PrepareConfig(workers=2, shard_bytes=SHARD_BYTES))
    assert folder_hashes(out) == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_file_stops_with_its_name(
    documents: list[str], tokenizer: TextTokenizer, tmp_path: Path, workers: int
) -> None:
    raw = gzip.compress(b"\n".join(json.dumps({"text": text}).encode() for text in documents))
    for name, content in (("a.jsonl.gz", raw), ("b.jsonl.gz", raw[:-100]), ("c.jsonl.gz", raw)):
        (tmp_path / name).write_bytes(content)
    config = PrepareConfig(workers=workers, shard_bytes=1)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: cannot be read: Compressed file ended"):
        prepare_sources([SourceConfig(path=str(tmp_path / "*.gz"))], tokenizer, tmp_path / "out", config)
    (tmp_path / "b.jsonl.gz").write_bytes(raw)
    result = prepare_sources(
        [SourceConfig(path=str(tmp_path / "*.gz"))], tokenizer, tmp_path / "out", config, overwrite=True
    )
    assert result.documents == 3 * len(documents)


def test_a_defect_in_a_worker_is_shown_with_its_traceback(
    corpus: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    from dataclasses import replace

    broken = replace(tokenizer, eos_id=2**70)
    with pytest.raises(RuntimeError, match=r"a worker process failed:(?s:.*)Traceback(?s:.*)Overflow"):
        prepare_sources(
            [SourceConfig(path=str(corpus))],
            broken,
            tmp_path / "out",
            PrepareConfig(workers=2, shard_bytes=SHARD_BYTES),
        )
