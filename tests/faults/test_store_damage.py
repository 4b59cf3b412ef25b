"""A flipped byte, a swapped file or an edited manifest of a token store is named; nothing is trained on it."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steep.config.load import load_run_config
from steep.core.errors import DataError
from steep.core.fingerprint import fingerprint
from steep.sources.config import SourceConfig
from steep.store.blocks import BLOCK_BYTES, BlockSums
from steep.store.config import PrepareConfig
from steep.store.inspect import inspect_store
from steep.store.prepare import prepare_sources
from steep.store.reader import TokenStore, open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import load_tokenizer
from steep.training.loop import train
from support import run_mapping

TRIES = 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path) -> Path:
    """A store with every kind of file."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "bad.txt").write_bytes(b"\xff\xfe is not UTF-8")
    tokenizer = load_tokenizer(TokenizerConfig(pretrained=str(tiny_tokenizer_directory)))
    paths = [str(corpus_directory), str(folder / "bad.txt")]
    prepare_sources([SourceConfig(path=paths)], tokenizer, folder / "store", PrepareConfig(shard_bytes=100_000))
    assert (folder / "store" / "rejected.jsonl").is_file()
    return folder / "store"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1 << bit]))


def read_all(store: TokenStore) -> None:
    for number in range(store.num_documents):
        store.document(number)


def test_every_flipped_bit_is_found(store: Path) -> None:
    chosen = random.Random(13)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    assert {path.suffix for path in files} >= {".bin", ".idx", ".npy", ".json", ".jsonl"}
    for number in range(TRIES):
        path = files[number % len(files)]
        at, bit = chosen.randrange(path.stat().st_size), chosen.randrange(8)
        flip(path, at, bit)
        with pytest.raises(DataError) as found:
            inspect_store(store, verify=True)
        assert path.name in str(found.value), (path, at, bit)
        if path.suffix == ".bin":
            with pytest.raises(DataError, match=f"{path.name}: block 0 .*Copy the store again"):
                read_all(open_store(store))
        flip(path, at, bit)
    assert "every file equals" in inspect_store(store, verify=True)["verified"]


def test_only_the_damaged_block_is_refused(tmp_path: Path) -> None:
    """Blocks are checked one by one, each when it is first read, with the checksums of what was written in any portions."""
    from dataclasses import replace

    from steep.store.blocks import BlockCheck
    from steep.store.formats import megatron
    from steep.store.token_file import map_of

    tokens = np.random.default_rng(1).integers(0, 60_000, BLOCK_BYTES + 77, dtype=np.uint16)  # two blocks and a little
    megatron.write(tmp_path / "a", tokens.dtype, [(np.array([len(tokens)]), tokens.astype(np.int64))])
    sums, raw = BlockSums(), tokens.tobytes()
    for begin in range(0, len(raw), 999_983):
        sums.update(memoryview(raw[begin : begin + 999_983]))
    assert len(sums.listed()) == 16 * 3
    flip(tmp_path / "a.bin", BLOCK_BYTES + 5, 0)
    shard = open_store(tmp_path / "a.bin").shards[0]
    content = map_of(shard.tokens)
    assert content is not None
    shard = replace(shard, blocks=BlockCheck(shard.path, content, 2, sums.listed(), "Copy it."))
    half = BLOCK_BYTES // 2
    assert np.array_equal(shard.read(0, half), tokens[:half])
    assert np.array_equal(shard.read(2 * half, len(tokens)), tokens[2 * half :])
    with pytest.raises(DataError, match=r"block 1 \(bytes 4,194,304 to 8,388,607\).*Copy it\."):
        shard.read(half - 1, half + 1)


def test_swapped_files_of_equal_size_are_named(store: Path) -> None:
    first = store / "shard_00001.bin"
    reversed_ids = np.fromfile(first, np.uint16)[::-1]
    reversed_ids.tofile(first)
    with pytest.raises(DataError, match=r"shard_00001\.bin: block 0"):
        read_all(open_store(store))


def _edit(manifest: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        manifest = manifest[int(parent) if parent.isdigit() else parent]  # type: ignore[index]
    manifest[last] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "1"), ("documents", -1), ("tokens", "many"), ("max_token_id", 2**40), ("tokenizer", []), ("ledger", 3),
        ("sources", None), ("shards", {}), ("shards.0", 5), ("shards.0.name", "../x"), ("shards.0.name", ""),
        ("shards.0.tokens", True), ("shards.0.sha256_idx", None), ("shards.0.xxh3_blocks", 7),
        ("shards.0.sha256_bin", "0" * 64), ("tokenizer.fingerprint", None), ("files", {"/etc/passwd": ""}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("forged", [False, True], ids=["edited", "with a checksum made for it"])
def test_a_manifest_that_cannot_be_is_refused(key: str, value: Any, forged: bool, store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    if key == "shards.0":
        manifest["shards"][0] = value
    else:
        _edit(manifest, key, value)
    if forged:
        del manifest["checksum"]
        manifest["checksum"] = fingerprint(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: .*edited or damaged\. Copy the store"):
        open_store(store)


def test_a_store_of_an_earlier_steep_is_read_and_its_lack_is_said(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    for key in ("checksum", "files"):
        del manifest[key]
    for entry in manifest["shards"]:
        del entry["xxh3_blocks"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert "an earlier steep wrote the store" in inspect_store(store, verify=True)["verified"]
    flip(store / "shard_00000.bin", 10, 1)
    with pytest.raises(DataError, match=r"shard_00000\.bin: its bytes"):
        inspect_store(store, verify=True)


def _flip_bin(folder: Path) -> None:
    path = min(folder.rglob("*.bin"))
    flip(path, path.stat().st_size // 2, 3)


def _flip_sidecar(folder: Path) -> None:
    path = min(folder.rglob("*.documents.npy"))
    flip(path, path.stat().st_size - 3, 3)


@pytest.mark.parametrize(
    ("damage", "named"), [(_flip_bin, r"\.bin: block 0"), (_flip_sidecar, r"\.documents\.npy: its")]
)
def test_a_run_stops_at_a_damaged_cache(
    damage: Callable[[Path], None], named: str, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    """Found by the thread that reads ahead, or at the start, and told by the run; after the remedy the run is as it should be."""
    cache = tmp_path / "cache"
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"steps": 30},
                          data={"cache_directory": str(cache)})  # fmt: skip
    train(load_run_config(mapping=mapping), stream=io.StringIO())
    damage(cache)
    again = {**mapping, "run": {**mapping["run"], "name": "again"}}
    with pytest.raises(DataError, match=f"{named}.* delete ") as stopped:
        train(load_run_config(mapping=again), stream=io.StringIO())
    remedy = Path(str(stopped.value).split(" or delete ")[1].split(" and ")[0])
    assert remedy.parent == cache / "prepared"
    shutil.rmtree(remedy)
    assert train(load_run_config(mapping=again), stream=io.StringIO()).step == 30
