"""Text to a token store, restartable: what `steep prepare` runs.

In: sources and a tokenizer. Out: a folder with shards, their tokenizer, rejected.jsonl and, last, manifest.json.
While it is being written the folder holds `.prepare/` with what identifies the store and the entries of finished shards. A
killed `prepare` continues from those, and the finished bytes are those of an uninterrupted one, for any number of workers.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from steep.core.files import read_json, remove_leftovers, write_json
from steep.runtime.device import usable_cpus
from steep.sources.config import SourceConfig
from steep.sources.document import Document
from steep.sources.inputs import STANDARD_INPUT, load_format, paths_of
from steep.store.config import PrepareConfig
from steep.store.contamination import write_table
from steep.store.formats.megatron import token_dtype
from steep.store.manifest import PREPARE_FOLDER, TOKENIZER_FOLDER, has_manifest, read_manifest
from steep.store.pool import run_items
from steep.store.prepare_finish import finish_store
from steep.store.prepare_folder import (
    IDENTITY_FILE,
    SPOOL_FILE,
    check_folder,
    exclusive,
    refuse_other,
    remove_store,
    spool_standard_input,
)
from steep.store.prepare_result import PrepareResult
from steep.store.select_documents import KEPT, kinds_of_notes, read_item, reasons_by_itself
from steep.store.shard_work import Preparation, is_finished, process_item
from steep.store.work import HashedInput, WorkItem, divide_into_items, gather_inputs, source_name, source_settings
from steep.store.writer import disk_errors
from steep.tokenizer.backend_choice import BackendChooser
from steep.tokenizer.encode import TextTokenizer

CHOICE_SETTINGS = ("shard_tokens", "max_tokens", "min_tokens", "max_tokens_per_document", "dedup")

Progress = Callable[[int, int, int], None]
"""Called with bytes on disk done, bytes on disk in all, tokens written."""


def prepare_sources(
    sources: list[SourceConfig],
    tokenizer: TextTokenizer,
    out: Path,
    config: PrepareConfig = PrepareConfig(),
    progress: Optional[Progress] = None,
    *,
    inputs: Optional[list[HashedInput]] = None,
    overwrite: bool = False,
    wait: bool = False,
) -> PrepareResult:
    """Prepare `sources` into the token store `out`.

    inputs: the files of `sources`, if they have already been found and hashed.
    overwrite: replace a finished or unfinished store that was made from something else (never other files).
    wait: if another process is preparing `out`, wait for it instead of raising.
    Raises DataError for inputs, records (`on_bad_record: stop`), space, or an `out` that holds something else.
    """
    out, folder = Path(out), Path(out) / PREPARE_FOLDER
    piped = inputs is None and any(STANDARD_INPUT in paths_of(source) for source in sources)
    if inputs is None and not piped:
        inputs = gather_inputs(sources)
    started = time.monotonic()
    check_folder(out)
    with disk_errors(out), exclusive(out, wait), contextlib.ExitStack() as stack:
        if piped:
            sources = [spool_standard_input(source, folder) for source in sources]
            stack.callback((folder / SPOOL_FILE).unlink, missing_ok=True)
            inputs = gather_inputs(sources)
            started = time.monotonic()
        assert inputs is not None
        identity = store_identity(inputs, sources, tokenizer, config)
        if overwrite:
            remove_store(out)
        if has_manifest(out):
            return _found(out, identity, started)
        items = divide_into_items(inputs, sources, config.shard_bytes)
        dtype, stop = token_dtype(tokenizer.vocab_size), config.on_bad_record == "stop"
        preparation = Preparation(out, sources, dtype, stop, {}, kinds_of_notes(config), config.chooses)
        unfinished = _continue_or_start(preparation, identity, items, tokenizer)
        if config.check_against:
            write_table(folder, config.check_against)
        backends = _choose_backends(inputs, sources, tokenizer, config.tokenizer_backend)
        preparation = replace(preparation, backends=backends)
        _run(preparation, items, unfinished, tokenizer, config, progress)
        manifest = finish_store(preparation, items, identity["settings"], inputs, config, tokenizer)
    seconds = time.monotonic() - started
    continued = len(items) - len(unfinished)
    return PrepareResult(out, manifest["documents"], manifest["tokens"], manifest["ledger"], seconds, False, continued)


def store_identity(
    inputs: list[HashedInput], sources: list[SourceConfig], tokenizer: TextTokenizer, config: PrepareConfig
) -> dict[str, Any]:
    """Everything that decides the bytes of the store, as JSON: content of the files, tokenizer, settings. Not their paths."""
    settings: dict[str, Any] = {
        "shard_bytes": config.shard_bytes,
        "on_bad_record": config.on_bad_record,
        "sources": [source_settings(source) for source in sources],
    }
    settings |= {key: getattr(config, key) for key in CHOICE_SETTINGS if getattr(config, key) is not None}
    if config.check_against:
        evaluation_inputs = gather_inputs([SourceConfig(path=path) for path in config.check_against])
        settings["check_against"] = [file.sha256 for file in evaluation_inputs]
        settings["drop_contaminated"] = config.drop_contaminated
    files = [[file.source, file.size, file.sha256] for file in inputs]
    return {"version": 1, "tokenizer": tokenizer.fingerprint, "settings": settings, "files": files}


def _choose_backends(
    inputs: list[HashedInput], sources: list[SourceConfig], tokenizer: TextTokenizer, wanted: str
) -> dict[int, str]:
    """Source number -> the name of its tokenizer backend, decided before any worker starts.

    Raises ConfigError as BackendChooser does, and DataError for a file that cannot be read.
    """
    chooser = BackendChooser(wanted, tokenizer)

    def documents(files: list[HashedInput], source: SourceConfig) -> Iterator[tuple[str, str]]:
        for file in files:
            for record in load_format(file.format).read(file.path, source):
                if isinstance(record, Document):
                    yield record.id, record.text

    chosen = {}
    for number, source in enumerate(sources):
        files = [file for file in inputs if file.source == number]
        size = sum(file.size for file in files)
        chosen[number] = chooser.choose(source_name(source), size, documents(files, source))
    return chosen


def _run(
    preparation: Preparation, items: list[WorkItem], unfinished: list[WorkItem], tokenizer: TextTokenizer, config: PrepareConfig,
    progress: Optional[Progress],
) -> None:  # fmt: skip
    total = sum(item.bytes for item in items)
    done = {item.number: (item.bytes, 0) for item in items}
    done.update({item.number: (0, 0) for item in unfinished})
    workers = config.workers or len(usable_cpus())

    def on_progress(number: int, item_bytes: int, tokens: int) -> None:
        done[number] = (item_bytes, tokens)
        if progress is not None:
            progress(sum(pair[0] for pair in done.values()), total, sum(pair[1] for pair in done.values()))

    for wave in _waves(preparation, items, unfinished, workers, config):
        if min(workers, len(wave)) > 1:
            run_items(preparation, wave, workers, on_progress)
            continue
        for item in wave:
            process_item(preparation, item, tokenizer, partial(on_progress, item.number))


def _waves(
    preparation: Preparation, items: list[WorkItem], unfinished: list[WorkItem], workers: int, config: PrepareConfig
) -> Iterator[list[WorkItem]]:
    """The unfinished items: all at once, or with `max_tokens` as many as seem to be needed, until there are enough.

    The items that are read beyond those needed depend on `workers`; the store does not.
    """
    if config.max_tokens is None or config.dedup is not None:  # duplicates are known only when everything has been read
        yield unfinished
        return
    waiting = {item.number for item in unfinished}
    kept_tokens, first = 0, 0
    while True:
        while first < len(items) and items[first].number not in waiting:
            documents = read_item(preparation, items[first])
            kept_tokens += int(documents.lengths[reasons_by_itself(preparation, documents, config) == KEPT].sum())
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


def _found(out: Path, identity: dict[str, Any], started: float) -> PrepareResult:
    """The result for a finished store. Raises DataError if it was made from something else."""
    manifest = read_manifest(out)
    files = [[source["number"], source["size"], source["sha256"]] for source in manifest["sources"]]
    made_with = manifest["tokenizer"]["fingerprint"]
    there = {"version": 1, "tokenizer": made_with, "settings": manifest["settings"], "files": files}
    refuse_other(out, there, identity, "already holds a token store")
    shutil.rmtree(out / PREPARE_FOLDER, ignore_errors=True)  # left by a kill between the manifest and this
    seconds = time.monotonic() - started
    return PrepareResult(
        out, manifest["documents"], manifest["tokens"], manifest["ledger"], seconds, already_there=True
    )


def _continue_or_start(
    preparation: Preparation, identity: dict[str, Any], items: list[WorkItem], tokenizer: TextTokenizer
) -> list[WorkItem]:
    """Make the folder ready and return the items that are not finished."""
    out = preparation.out
    identity_path = out / PREPARE_FOLDER / IDENTITY_FILE
    for folder in (out, identity_path.parent, out / TOKENIZER_FOLDER):
        remove_leftovers(folder)
    if identity_path.is_file() and list(identity_path.parent.glob("shard_*.json")):
        refuse_other(out, read_json(identity_path), identity, "holds an unfinished token store")
    else:
        remove_store(out)  # nothing is lost: no shard is finished
    write_json(identity_path, identity)
    tokenizer.save(out / TOKENIZER_FOLDER)
    return [item for item in items if not is_finished(preparation, item)]
