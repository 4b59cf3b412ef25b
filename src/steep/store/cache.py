"""Text given straight to `train` is prepared once and kept, under a name made from its content.

The key covers the content of every file (SHA-256), the tokenizer and the settings; paths, times and the number of workers
do not matter. An interrupted entry is continued. If two processes want the same entry, one prepares it and the other waits.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

from steep.core.cache_directory import default_cache_directory
from steep.core.errors import DataError
from steep.core.fingerprint import fingerprint
from steep.core.say import Say, tell
from steep.sources.config import SourceConfig
from steep.sources.dropped import dropped_line
from steep.sources.hints import say_hints
from steep.sources.inputs import check_readable, paths_of
from steep.store.config import PrepareConfig
from steep.store.detect import token_file
from steep.store.formats import formats
from steep.store.manifest import REJECTED_FILE, has_manifest
from steep.store.prepare import Progress, prepare_sources, store_identity
from steep.store.reader import TokenStore, is_store, open_store
from steep.store.work import gather_inputs, source_name
from steep.tokenizer.encode import TextTokenizer

HASH_MEMORY = "file_hashes.json"


def cached_store(
    source: SourceConfig,
    tokenizer: TextTokenizer,
    config: PrepareConfig,
    cache_directory: Union[str, Path, None] = None,
    progress: Optional[Progress] = None,
) -> Path:
    """The token store of a text source, prepared now unless it is in the cache. Raises DataError as `prepare` does."""
    source = SourceConfig.model_validate(source.model_dump(include=set(SourceConfig.model_fields)))
    directory = default_cache_directory() if cache_directory is None else Path(cache_directory).expanduser()
    inputs = gather_inputs([source], directory / HASH_MEMORY)
    key = fingerprint(store_identity(inputs, [source], tokenizer, config))
    out = directory / "prepared" / key
    if not has_manifest(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{directory}: prepared text cannot be kept there: {(error.strerror or str(error)).lower()}. Set "
                "data.cache_directory, or the variable STEEP_CACHE, to a folder that can be written."
            ) from error
        prepare_sources([source], tokenizer, out, config, progress, inputs=inputs, wait=True)
    return out


def store_paths(source: SourceConfig) -> list[Path]:
    """The token stores that a source names; empty for text. Raises DataError when it names both, or when its format asks for a
    store and there is none."""
    if source.format not in ("auto", "store", *formats()):
        return []
    candidates: list[Path] = []
    for given in paths_of(source):
        check_readable(given)
        is_one = os.path.exists(given) or is_store(given)
        candidates += map(Path, [given] if is_one else sorted(glob.glob(given, recursive=True)))
    if source.format in formats():
        return _each_once(candidates)  # what is wrong with them is found when they are opened
    stores = [path for path in candidates if is_store(path)]
    text = next((path for path in candidates if path not in stores), None)
    if text is not None and source.format == "store":
        raise DataError(
            f"{text}: is not a token store (a folder with manifest.json, or files of tokens: {', '.join(formats())})."
        )
    if text is not None and stores:
        raise DataError(f"{stores[0]} is a token store and {text} is not; give them as two sources.")
    return _each_once(stores)


def _each_once(paths: list[Path]) -> list[Path]:
    """Folders as they are, and for any file of a store the file with its tokens; each once, in order."""
    found = [None if path.is_dir() else token_file(path) for path in paths]
    return list(dict.fromkeys(path if entry is None else entry[0] for path, entry in zip(paths, found, strict=True)))


def open_sources(
    sources: Sequence[SourceConfig],
    tokenizer: TextTokenizer,
    config: PrepareConfig = PrepareConfig(),
    cache_directory: Union[str, Path, None] = None,
    progress: Optional[Progress] = None,
    *,
    say: Say = tell,
) -> list[TokenStore]:
    """One open token store per source: stores as they are, text through the cache.

    say: told what was assumed of them and what was dropped. Raises DataError for a store that was made with another tokenizer.
    """
    directory = None if cache_directory is None else Path(cache_directory).expanduser()
    stores = []
    for source in sources:
        paths = store_paths(source)
        if paths:
            eos_id, bos_id = tokenizer.eos_id, tokenizer.bos_id
            store = open_store(
                paths, format=source.format, eos_id=eos_id, bos_id=bos_id, cache_directory=directory, say=say
            )
            check_tokenizer(store, tokenizer)
        else:
            store = open_store(cached_store(source, tokenizer, config, directory, progress))
            say_hints(source, say)
        say_dropped(source_name(source), store, say)
        stores.append(store)
    return stores


def say_dropped(name: str, store: TokenStore, say: Say) -> None:
    """Say in one line what was dropped when the store of source `name` was prepared, if anything was and it is known."""
    if line := dropped_line(name, store.manifest.get("ledger", {}), store.path / REJECTED_FILE):
        say(line)


def check_tokenizer(store: TokenStore, tokenizer: TextTokenizer) -> None:
    """Raise DataError unless `store` was made with `tokenizer`, as far as is known."""
    known = store.tokenizer_fingerprint
    if known is not None and known != tokenizer.fingerprint:
        made_with = store.manifest["tokenizer"]
        raise DataError(
            f"{store.path}: was made with another tokenizer or BOS/EOS policy:\n"
            f"  store: {made_with.get('description') or 'tokenizer'} {known[:12]}, "
            f"append_eos {made_with['append_eos']}, prepend_bos {made_with['prepend_bos']}, {made_with['vocab_size']:,} ids\n"
            f"  run:   {tokenizer.description or 'tokenizer'} {tokenizer.fingerprint[:12]}, "
            f"append_eos {tokenizer.append_eos}, prepend_bos {tokenizer.prepend_bos}, {tokenizer.vocab_size:,} ids\n"
            "  Prepare the text again with the run's tokenizer, or set tokenizer.pretrained to the store's."
        )
    if store.max_token_id >= tokenizer.vocab_size:
        raise DataError(
            f"{store.path}: contains token id {store.max_token_id:,}, but the tokenizer has only {tokenizer.vocab_size:,} ids."
        )
