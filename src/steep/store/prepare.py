"""Text to a token store, restartable: what `steep prepare` runs.

In: sources and a tokenizer. Out: a folder with shards, their tokenizer, rejected.jsonl and, last, manifest.json.
While it is being written the folder holds `.prepare/` with the plan and the entries of finished shards; a killed `prepare`
continues from those, and the finished bytes are those of an uninterrupted one, for any number of workers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from steep.core.errors import DataError
from steep.core.files import atomic_writer, read_json, remove_leftovers, write_json
from steep.core.units import format_bytes, format_count, format_seconds
from steep.sources.config import SourceConfig
from steep.store.backends import choose_backends
from steep.store.config import PrepareConfig
from steep.store.manifest import (
    MANIFEST_FILE,
    REJECTED_FILE,
    SIDECAR_SUFFIX,
    TOKENIZER_FOLDER,
    add_ledgers,
    has_manifest,
    make_manifest,
    read_manifest,
)
from steep.store.megatron import token_dtype
from steep.store.pool import run_items
from steep.store.shard_work import PREPARE_FOLDER, Job, process_item, record_path, rejected_path
from steep.store.work import Inputs, WorkItem, gather_inputs, plan_items, source_name, source_settings
from steep.store.writer import disk_errors
from steep.tokenizer.encode import TextTokenizer

PLAN_FILE = "plan.json"
LOCK_FILE = "lock"

Progress = Callable[[int, int, int], None]
"""Called with bytes on disk done, bytes on disk in all, tokens written."""


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` made or found."""

    path: Path
    """The token store."""
    documents: int
    tokens: int
    ledger: dict[str, Any] = field(repr=False)
    """records_read, documents_kept, dropped {reason: count}, text_bytes, tokens."""
    seconds: float
    already_there: bool = False
    """The store was finished before; nothing was written."""
    shards_continued: int = 0
    """Shards that an earlier, interrupted call had finished."""

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.ledger["dropped"].items()) or "none"
        how = "already there" if self.already_there else f"prepared in {format_seconds(self.seconds)}"
        return (
            f"{self.path}: {self.documents:,} documents, {format_count(self.tokens)} tokens from "
            f"{format_bytes(self.ledger['text_bytes'])} of text, {how}. "
            f"{self.ledger['records_read']:,} records read, dropped: {dropped}."
        )


def prepare(
    sources: list[SourceConfig],
    tokenizer: TextTokenizer,
    out: Path,
    config: PrepareConfig = PrepareConfig(),
    progress: Optional[Progress] = None,
    *,
    overwrite: bool = False,
    wait: bool = False,
) -> PrepareResult:
    """Prepare `sources` into the token store `out`.

    overwrite: replace a store or an unfinished one that was made from something else (never other files).
    wait: if another process is preparing `out`, wait for it instead of raising.
    Raises DataError for inputs, records (`on_bad_record: stop`), space, or an `out` that holds something else.
    """
    return prepare_inputs(
        gather_inputs(sources), sources, tokenizer, out, config, progress, overwrite=overwrite, wait=wait
    )


def prepare_inputs(
    inputs: Inputs,
    sources: list[SourceConfig],
    tokenizer: TextTokenizer,
    out: Path,
    config: PrepareConfig,
    progress: Optional[Progress] = None,
    *,
    overwrite: bool = False,
    wait: bool = False,
) -> PrepareResult:
    """`prepare` for files that have been found and hashed already."""
    started = time.monotonic()
    out = Path(out)
    plan = make_plan(inputs, sources, tokenizer, config)
    _check_folder(out)
    with disk_errors(out), _exclusive(out, wait):
        if overwrite:
            _remove_store(out)
        if has_manifest(out):
            return _found(out, plan, started)
        items = plan_items(inputs, config.shard_bytes)
        unfinished = _continue_or_start(out, plan, items, tokenizer)
        backends = choose_backends(inputs, sources, tokenizer, config.tokenizer_backend)
        job = Job(out, sources, token_dtype(tokenizer.vocab_size), config.on_bad_record == "stop", backends)
        _run(job, items, unfinished, tokenizer, config.workers or usable_cores(), progress)
        manifest = _finish(out, items, plan, inputs, job, tokenizer)
        continued = len(items) - len(unfinished)
        seconds = time.monotonic() - started
        return PrepareResult(
            out, manifest["documents"], manifest["tokens"], manifest["ledger"], seconds, False, continued
        )


def make_plan(
    inputs: Inputs, sources: list[SourceConfig], tokenizer: TextTokenizer, config: PrepareConfig
) -> dict[str, Any]:
    """Everything that decides the bytes of the store, as JSON: content of the files, tokenizer, settings. Not their paths."""
    numbers = [number for number, _ in inputs.files]
    return {
        "version": 1,
        "tokenizer": tokenizer.fingerprint,
        "settings": {
            "shard_bytes": config.shard_bytes,
            "on_bad_record": config.on_bad_record,
            "sources": [source_settings(source) for source in sources],
        },
        "files": [list(file) for file in zip(numbers, inputs.sizes, inputs.sha256, strict=True)],
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(
    job: Job, items: list[WorkItem], unfinished: list[WorkItem], tokenizer: TextTokenizer, workers: int,
    progress: Optional[Progress],
) -> None:  # fmt: skip
    total = sum(item.bytes for item in items)
    done = {item.number: (item.bytes, 0) for item in items}
    done.update({item.number: (0, 0) for item in unfinished})

    def on_progress(number: int, item_bytes: int, tokens: int) -> None:
        done[number] = (item_bytes, tokens)
        if progress is not None:
            progress(sum(pair[0] for pair in done.values()), total, sum(pair[1] for pair in done.values()))

    if min(workers, len(unfinished)) > 1:
        run_items(job, unfinished, workers, on_progress)
        return
    for item in unfinished:
        process_item(job, item, tokenizer, partial(on_progress, item.number))


def _finish(
    out: Path, items: list[WorkItem], plan: dict[str, Any], inputs: Inputs, job: Job, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Join what the shards noted and write the manifest, which makes the folder a store."""
    entries = [read_json(record_path(out, item.name)) for item in items]
    ledger = add_ledgers(entry["ledger"] for entry in entries)
    if not ledger["documents_kept"]:
        message = _nothing_kept(ledger, entries)
        _remove_store(out)  # so that the next call, with other settings, starts afresh
        raise DataError(message)
    _join_rejected(out, items)
    manifest = make_manifest(
        shards=[entry["shard"] for entry in entries if entry["shard"]["documents"]],
        dtype=token_dtype(tokenizer.vocab_size).name,
        tokenizer={"fingerprint": tokenizer.fingerprint, **tokenizer.policy, "vocab_size": tokenizer.vocab_size,
                   "description": tokenizer.description,
                   "backends": [tokenizer.encoder(name).description for _, name in sorted(job.backends.items())]},
        sources=_describe_sources(inputs, job.sources),
        settings=plan["settings"],
        ledger=ledger,
        max_token_id=max(entry["max_token_id"] for entry in entries),
    )  # fmt: skip
    for entry in entries:
        if not entry["shard"]["documents"]:
            _remove_shard(out, entry["shard"]["name"])
    write_json(out / MANIFEST_FILE, manifest)
    shutil.rmtree(out / PREPARE_FOLDER)
    return manifest


def _describe_sources(inputs: Inputs, sources: list[SourceConfig]) -> list[dict[str, Any]]:
    names = [source_name(source) for source in sources]
    rows = zip(inputs.files, inputs.sizes, inputs.sha256, strict=True)
    return [
        {"source": names[number], "number": number, "path": str(file.path), "format": file.format, "size": size,
         "sha256": digest}
        for (number, file), size, digest in rows
    ]  # fmt: skip


def _nothing_kept(ledger: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    if not ledger["dropped"]:
        return "there is not one document in the input: every file is empty."
    reason, count = max(ledger["dropped"].items(), key=lambda pair: pair[1])
    example = next(entry["first_rejected"][reason] for entry in entries if reason in entry["first_rejected"])
    return (
        f"there is not one document in the input: all {ledger['records_read']:,} records were rejected, {count:,} as "
        f"{reason!r}. The first of those: {example}"
    )


def _join_rejected(out: Path, items: list[WorkItem]) -> None:
    paths = [rejected_path(out, item.name) for item in items]
    if not any(path.stat().st_size for path in paths):
        return
    with atomic_writer(out / REJECTED_FILE) as joined:
        for path in paths:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, joined)


def _found(out: Path, plan: dict[str, Any], started: float) -> PrepareResult:
    """A finished store: good if it was made from the same."""
    manifest = read_manifest(out)
    files = [[source["number"], source["size"], source["sha256"]] for source in manifest["sources"]]
    same = {
        "version": 1,
        "tokenizer": manifest["tokenizer"]["fingerprint"],
        "settings": manifest["settings"],
        "files": files,
    }
    _refuse_other(out, same, plan, "already holds a token store")
    shutil.rmtree(out / PREPARE_FOLDER, ignore_errors=True)  # left by a kill between the manifest and this
    seconds = time.monotonic() - started
    return PrepareResult(
        out, manifest["documents"], manifest["tokens"], manifest["ledger"], seconds, already_there=True
    )


def _continue_or_start(
    out: Path, plan: dict[str, Any], items: list[WorkItem], tokenizer: TextTokenizer
) -> list[WorkItem]:
    """Make the folder ready and return the items that still have to be done."""
    plan_path = out / PREPARE_FOLDER / PLAN_FILE
    for folder in (out, plan_path.parent, out / TOKENIZER_FOLDER):
        remove_leftovers(folder)
    if plan_path.is_file() and list(plan_path.parent.glob("shard_*.json")):
        _refuse_other(out, read_json(plan_path), plan, "holds an unfinished token store")
    else:
        _remove_store(out)  # nothing is lost: no shard was finished
    write_json(plan_path, plan)
    tokenizer.save(out / TOKENIZER_FOLDER)
    return [item for item in items if not _is_finished(out, item)]


def _is_finished(out: Path, item: WorkItem) -> bool:
    path = record_path(out, item.name)
    if not path.is_file():
        return False
    shard = read_json(path)["shard"]
    files = [out / f"{item.name}{suffix}" for suffix in (".bin", ".idx", SIDECAR_SUFFIX)]
    return all(file.is_file() for file in files) and files[0].stat().st_size == shard["bytes"]


def _refuse_other(out: Path, there: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    differences = plan_differences(there, wanted)
    if differences:
        raise DataError(
            f"{out} {what} that was made from something else:\n"
            + "".join(f"  {difference}\n" for difference in differences)
            + "  Choose another folder, or overwrite it (--overwrite)."
        )


def plan_differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two plans, in words."""
    found = []
    if there["version"] != wanted["version"]:
        found.append("it was made by another version of steep")
    if there["tokenizer"] != wanted["tokenizer"]:
        found.append(f"tokenizer: {there['tokenizer']} there, {wanted['tokenizer']} now")
    for key, value in wanted["settings"].items():
        if there["settings"].get(key) != value:
            found.append(f"{key}: {there['settings'].get(key)} there, {value} now")
    if there["files"] != wanted["files"]:
        before, after = ({tuple(file) for file in plan["files"]} for plan in (there, wanted))
        found.append(
            f"input: {len(there['files'])} files there, {len(wanted['files'])} now; "
            f"{len(before & after)} of them with the same content"
        )
    return found


def _check_folder(out: Path) -> None:
    """Refuse to write beside files that are not ours."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; a folder for the token store is needed.")
    visible = [path for path in out.iterdir() if not path.name.startswith(".")]
    if visible and not has_manifest(out) and not (out / PREPARE_FOLDER).is_dir():
        raise DataError(
            f"{out}: is not empty and is no token store (it holds {visible[0].name}). Choose another folder."
        )


def _remove_store(out: Path) -> None:
    """Delete what `prepare` writes, the manifest first so that half a store never looks whole. The lock stays."""
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    (out / REJECTED_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
    for path in [*out.glob("shard_*.bin"), *out.glob("shard_*.idx"), *out.glob(f"shard_*{SIDECAR_SUFFIX}")]:
        path.unlink()
    for path in (out / PREPARE_FOLDER).glob("*"):
        if path.name != LOCK_FILE:
            path.unlink()


def _remove_shard(out: Path, name: str) -> None:
    for suffix in (".bin", ".idx", SIDECAR_SUFFIX):
        (out / f"{name}{suffix}").unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusive(out: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when this process dies, however it dies."""
    import fcntl

    path = out / PREPARE_FOLDER / LOCK_FILE
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                raise DataError(
                    f"{out}: process {file.read() or '(unknown)'} is preparing it now. Wait for it or stop it."
                ) from None
            if not _is_same_file(file.fileno(), path):
                continue  # its holder finished the store and removed the lock; try again with a new one
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                _remove_empty_prepare_folder(out)
            return


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_empty_prepare_folder(out: Path) -> None:
    """Take the lock's folder away where nothing else is in it, so that a refused call leaves no trace."""
    folder = out / PREPARE_FOLDER
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
        shutil.rmtree(folder)
