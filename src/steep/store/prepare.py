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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from steep.core.errors import ConfigError, DataError
from steep.core.files import atomic_writer, read_json, remove_leftovers, write_json
from steep.core.lock import FileLock, LockHeldError
from steep.core.units import format_bytes, format_count, format_seconds
from steep.sources.config import TEXT_FORMATS, SourceConfig
from steep.sources.inputs import STANDARD_INPUT, paths_of
from steep.store.backends import choose_backends
from steep.store.config import PrepareConfig
from steep.store.contamination import evaluation_inputs, write_table
from steep.store.export_tokens import SHARD_TOKENS, write_format
from steep.store.formats import writable_formats
from steep.store.formats.megatron import token_dtype
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
from steep.store.pool import run_items
from steep.store.reader import open_store
from steep.store.select_documents import (
    KEPT,
    Choice,
    choose_documents,
    count_duplicates,
    kinds_of_notes,
    read_item,
    reasons_by_itself,
    report_contamination,
    write_rejected,
    write_shards,
)
from steep.store.shard_work import PREPARE_FOLDER, Job, process_item, record_path
from steep.store.spool import SPOOL_FILE, spool_standard_input
from steep.store.work import Inputs, WorkItem, gather_inputs, plan_items, source_name, source_settings
from steep.store.writer import disk_errors
from steep.tokenizer.encode import TextTokenizer

PLAN_FILE = "plan.json"
CONTAMINATED_FILE = "contaminated.jsonl"
CHOICE_SETTINGS = ("shard_tokens", "max_tokens", "min_tokens", "max_tokens_per_document", "dedup")
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
    files: tuple[Path, ...] = ()
    """The .bin files that were written for another tool."""
    hints: tuple[str, ...] = ()
    """What was left out on purpose, and settings that seem to be missing."""

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.ledger["dropped"].items()) or "none"
        how = "already there" if self.already_there else f"prepared in {format_seconds(self.seconds)}"
        summary = (
            f"{self.path}: {self.documents:,} documents, {format_count(self.tokens)} tokens from "
            f"{format_bytes(self.ledger['text_bytes'])} of text, {how}. "
            f"{self.ledger['records_read']:,} records read, dropped: {dropped}."
        )
        return "\n".join([summary, *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        yield from self.hints
        if (unused := self.ledger.get("not_used")) is not None:
            yield f"not used: the last {format_bytes(unused['bytes'])} of the input, since {unused['reason']}."
        repeats = self.ledger.get("exact_duplicates", {"documents": 0, "tokens": 0})
        if repeats["documents"]:
            yield (
                f"{repeats['documents']:,} documents ({format_count(repeats['tokens'])} tokens) repeat an earlier one word "
                "for word; --dedup exact drops them."
            )
        if (found := self.ledger.get("contamination")) is not None:
            yield (
                f"{found['documents']:,} documents ({format_count(found['tokens'])} tokens) share {found['run_words']} words "
                f"in a row with the evaluation texts{f'; see {CONTAMINATED_FILE}' if found['documents'] else ''}."
            )
        if self.files:
            others = f" and {len(self.files) - 1:,} more" if len(self.files) > 1 else ""
            yield f"{self.files[0]}{others}: written."


def prepare_sources(
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
    out = Path(out)
    if not any(STANDARD_INPUT in paths_of(source) for source in sources):
        inputs = gather_inputs(sources)
        return prepare_inputs(inputs, sources, tokenizer, out, config, progress, overwrite=overwrite, wait=wait)
    _check_folder(out)
    with disk_errors(out), _exclusive(out, wait):
        spooled = [spool_standard_input(source, out / PREPARE_FOLDER) for source in sources]
        try:
            return _prepare_locked(
                gather_inputs(spooled), spooled, tokenizer, out, config, progress, overwrite, time.monotonic()
            )
        finally:
            (out / PREPARE_FOLDER / SPOOL_FILE).unlink(missing_ok=True)


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
    _check_folder(out)
    with disk_errors(out), _exclusive(out, wait):
        return _prepare_locked(inputs, sources, tokenizer, out, config, progress, overwrite, started)


def _prepare_locked(
    inputs: Inputs, sources: list[SourceConfig], tokenizer: TextTokenizer, out: Path, config: PrepareConfig,
    progress: Optional[Progress], overwrite: bool, started: float,
) -> PrepareResult:  # fmt: skip
    plan = make_plan(inputs, sources, tokenizer, config)
    if overwrite:
        _remove_store(out)
    if has_manifest(out):
        return _found(out, plan, started)
    items = plan_items(inputs, sources, config.shard_bytes)
    dtype, stop = token_dtype(tokenizer.vocab_size), config.on_bad_record == "stop"
    job = Job(out, sources, dtype, stop, {}, kinds_of_notes(config), config.chooses)
    unfinished = _continue_or_start(job, plan, items, tokenizer)
    if config.check_against:
        write_table(out / PREPARE_FOLDER, config.check_against, evaluation_inputs(config.check_against))
    job = replace(job, backends=choose_backends(inputs, sources, tokenizer, config.tokenizer_backend))
    _run(job, items, unfinished, tokenizer, config, progress)
    manifest = _finish(job, items, plan, inputs, config, tokenizer)
    seconds = time.monotonic() - started
    continued = len(items) - len(unfinished)
    return PrepareResult(out, manifest["documents"], manifest["tokens"], manifest["ledger"], seconds, False, continued)


def check_export_format(format: Optional[str]) -> None:
    """Raise ConfigError for a format that cannot be written."""
    if format is None or format in writable_formats():
        return
    hint = f" For the format of the input: --input-format {format}." if format in ("auto", *TEXT_FORMATS) else ""
    raise ConfigError(f"format {format!r}: steep writes {', '.join(writable_formats())}.{hint}")


def write_export(result: PrepareResult, format: str, shard_tokens: Optional[int]) -> PrepareResult:
    """Write a finished store as another tool's files, in its folder `format`, unless they are there. Raises as
    `export_tokens.write_format`."""
    out = result.path / format
    if not out.is_dir():  # it is whole or absent, and goes when the store is replaced
        write_format(open_store(result.path), out, format, shard_tokens=shard_tokens or SHARD_TOKENS)
    return replace(result, files=tuple(sorted(out.glob("*.bin"))))


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
            **_choice_settings(config),
        },
        "files": [list(file) for file in zip(numbers, inputs.sizes, inputs.sha256, strict=True)],
    }


def _choice_settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that were given and choose documents or make shards."""
    settings: dict[str, Any] = {
        key: getattr(config, key) for key in CHOICE_SETTINGS if getattr(config, key) is not None
    }
    if config.check_against:
        settings["check_against"] = evaluation_inputs(config.check_against).sha256
        settings["drop_contaminated"] = config.drop_contaminated
    return settings


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(
    job: Job, items: list[WorkItem], unfinished: list[WorkItem], tokenizer: TextTokenizer, config: PrepareConfig,
    progress: Optional[Progress],
) -> None:  # fmt: skip
    total = sum(item.bytes for item in items)
    done = {item.number: (item.bytes, 0) for item in items}
    done.update({item.number: (0, 0) for item in unfinished})
    workers = config.workers or usable_cores()

    def on_progress(number: int, item_bytes: int, tokens: int) -> None:
        done[number] = (item_bytes, tokens)
        if progress is not None:
            progress(sum(pair[0] for pair in done.values()), total, sum(pair[1] for pair in done.values()))

    for wave in _waves(job, items, unfinished, workers, config):
        if min(workers, len(wave)) > 1:
            run_items(job, wave, workers, on_progress)
            continue
        for item in wave:
            process_item(job, item, tokenizer, partial(on_progress, item.number))


def _waves(
    job: Job, items: list[WorkItem], unfinished: list[WorkItem], workers: int, config: PrepareConfig
) -> Iterator[list[WorkItem]]:
    """The unfinished items: all at once, or with `max_tokens` as many as it seems to take, until there are enough.

    Which items are read beyond those that are needed depends on `workers`; what becomes of the store does not.
    """
    if config.max_tokens is None or config.dedup is not None:  # what a duplicate is, is known only when all is read
        yield unfinished
        return
    waiting = {item.number for item in unfinished}
    kept_tokens, first = 0, 0
    while True:
        while first < len(items) and items[first].number not in waiting:
            documents = read_item(job, items[first])
            kept_tokens += int(documents.lengths[reasons_by_itself(job, documents, config) == KEPT].sum())
            first += 1
            if kept_tokens >= config.max_tokens:
                return
        if first == len(items):
            return
        missing_tokens = config.max_tokens - kept_tokens
        needed = -(-missing_tokens * first // kept_tokens) if kept_tokens else 0
        wave = [item for item in items[first:] if item.number in waiting][: max(workers, needed)]
        yield wave
        waiting -= {item.number for item in wave}


def _finish(
    job: Job, items: list[WorkItem], plan: dict[str, Any], inputs: Inputs, config: PrepareConfig,
    tokenizer: TextTokenizer,
) -> dict[str, Any]:  # fmt: skip
    """Join what the shards noted, choose the documents and write the manifest, which makes the folder a store."""
    out = job.out
    choice = choose_documents(job, [item for item in items if _is_finished(job, item)], config)
    entries = [documents.entry for documents in choice.items]
    ledger = add_ledgers(entry["ledger"] for entry in entries)
    if not (choice.reasons == KEPT).any():
        message = _nothing_kept(ledger, entries, choice)
        _remove_store(out)  # so that the next call, with other settings, starts afresh
        raise DataError(message)
    shards = _final_shards(job, choice, config)
    ledger |= {
        "documents_kept": sum(shard["documents"] for shard in shards),
        "dropped": dict(sorted({**ledger["dropped"], **choice.dropped}.items())),
        "text_bytes": choice.text_bytes,
        "tokens": sum(shard["tokens"] for shard in shards),
        "exact_duplicates": count_duplicates(choice.items, choice.reasons == KEPT),
    }
    if choice.dropped:
        ledger["dropped_tokens"] = dict(sorted(choice.dropped_tokens.items()))
    if len(choice.items) < len(items):
        rest = items[len(choice.items) :]
        ledger["not_used"] = {"bytes": sum(item.bytes for item in rest), "reason": "max_tokens was reached"}
    if config.check_against:
        with atomic_writer(out / CONTAMINATED_FILE) as file:
            ledger["contamination"] = report_contamination(job, choice.items, file)
        if not ledger["contamination"]["documents"]:
            (out / CONTAMINATED_FILE).unlink()
    if ledger["dropped"]:
        with atomic_writer(out / REJECTED_FILE) as file:
            write_rejected(job, choice, config, file)
    manifest = make_manifest(
        shards=[{key: value for key, value in shard.items() if key != "max_token_id"} for shard in shards],
        dtype=job.dtype.name,
        tokenizer={"fingerprint": tokenizer.fingerprint, **tokenizer.policy, "vocab_size": tokenizer.vocab_size,
                   "description": tokenizer.description,
                   "backends": [tokenizer.encoder(name).description for _, name in sorted(job.backends.items())]},
        sources=_describe_sources(inputs, job.sources, out / PREPARE_FOLDER / SPOOL_FILE),
        settings=plan["settings"],
        ledger=ledger,
        max_token_id=max(shard["max_token_id"] for shard in shards),
    )  # fmt: skip
    write_json(out / MANIFEST_FILE, manifest)
    shutil.rmtree(out / PREPARE_FOLDER)
    return manifest


def _final_shards(job: Job, choice: Choice, config: PrepareConfig) -> list[dict[str, Any]]:
    """The store's shards: those of the items, or new ones of the documents that were chosen."""
    if job.chooses:
        return write_shards(job, choice, config.shard_tokens)
    entries = [documents.entry for documents in choice.items]
    for entry in entries:
        if not entry["shard"]["documents"]:
            _remove_shard(job.out, entry["shard"]["name"])
    return [
        {**entry["shard"], "max_token_id": entry["max_token_id"]} for entry in entries if entry["shard"]["documents"]
    ]


def _describe_sources(inputs: Inputs, sources: list[SourceConfig], spooled: Path) -> list[dict[str, Any]]:
    names = [source_name(source) for source in sources]
    rows = zip(inputs.files, inputs.sizes, inputs.sha256, strict=True)
    return [
        {
            "source": names[number],
            "number": number,
            "path": STANDARD_INPUT if file.path == spooled else str(file.path),
            "format": file.format,
            "size": size,
            "sha256": digest,
        }
        for (number, file), size, digest in rows
    ]


def _nothing_kept(ledger: dict[str, Any], entries: list[dict[str, Any]], choice: Choice) -> str:
    dropped = {**ledger["dropped"], **choice.dropped}
    if not dropped:
        return "there is not one document in the input: every file is empty."
    reason, count = max(dropped.items(), key=lambda pair: pair[1])
    if reason in choice.dropped:
        return (
            f"not one document is left: of {ledger['records_read']:,} records {count:,} were dropped as {reason!r}. "
            "Change that setting."
        )
    example = next(entry["first_rejected"][reason] for entry in entries if reason in entry["first_rejected"])
    return (
        f"there is not one document in the input: all {ledger['records_read']:,} records were rejected, {count:,} as "
        f"{reason!r}. The first of those: {example}"
    )


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
    job: Job, plan: dict[str, Any], items: list[WorkItem], tokenizer: TextTokenizer
) -> list[WorkItem]:
    """Make the folder ready and return the items that still have to be done."""
    out = job.out
    plan_path = out / PREPARE_FOLDER / PLAN_FILE
    for folder in (out, plan_path.parent, out / TOKENIZER_FOLDER):
        remove_leftovers(folder)
    if plan_path.is_file() and list(plan_path.parent.glob("shard_*.json")):
        _refuse_other(out, read_json(plan_path), plan, "holds an unfinished token store")
    else:
        _remove_store(out)  # nothing is lost: no shard was finished
    write_json(plan_path, plan)
    tokenizer.save(out / TOKENIZER_FOLDER)
    return [item for item in items if not _is_finished(job, item)]


def _is_finished(job: Job, item: WorkItem) -> bool:
    path = record_path(job.out, item.name)
    if not path.is_file():
        return False
    shard = read_json(path)["shard"]
    files = [job.shard_folder / f"{item.name}{suffix}" for suffix in (".bin", ".idx", SIDECAR_SUFFIX)]
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
    for key in [*wanted["settings"], *(key for key in there["settings"] if key not in wanted["settings"])]:
        before, now = there["settings"].get(key), wanted["settings"].get(key)
        if before != now:
            found.append(f"{key}: {before} there, {now} now")
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
    for name in (REJECTED_FILE, CONTAMINATED_FILE):
        (out / name).unlink(missing_ok=True)
    for folder in (TOKENIZER_FOLDER, *writable_formats()):
        shutil.rmtree(out / folder, ignore_errors=True)
    for path in [*out.glob("shard_*.bin"), *out.glob("shard_*.idx"), *out.glob(f"shard_*{SIDECAR_SUFFIX}")]:
        path.unlink()
    for path in (out / PREPARE_FOLDER).glob("*"):
        if path.name not in (LOCK_FILE, SPOOL_FILE):
            path.unlink()


def _remove_shard(out: Path, name: str) -> None:
    for suffix in (".bin", ".idx", SIDECAR_SUFFIX):
        (out / f"{name}{suffix}").unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusive(out: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when this process dies, however it dies."""
    lock = FileLock(out / PREPARE_FOLDER / LOCK_FILE)
    try:
        lock.acquire(wait)
    except LockHeldError as error:
        who = str(error) or "(unknown)"
        raise DataError(f"{out}: process {who} is preparing it now. Wait for it or stop it.") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{out}: cannot be made or written: {reason}. Choose another folder.") from error
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        stack.callback(_remove_empty_prepare_folder, out)
        yield


def _remove_empty_prepare_folder(out: Path) -> None:
    """Take the lock's folder away where nothing else is in it, so that a refused call leaves no trace."""
    folder = out / PREPARE_FOLDER
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
        shutil.rmtree(folder)
