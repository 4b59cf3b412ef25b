"""What it costs to compare a token store with its checksums while a run reads it.

    python benchmarks/block_checks.py [--tokens 200000000] [--repeats 5]

A store of `--tokens` random u16 tokens in documents of log-normal length (mean about 900), in the page cache. One whole epoch is
read by the loader in batches of 8 x 2,048, in the calling thread, with and without `xxh3_blocks` in the manifest; the two ways
take turns. An epoch is the worst case: every block is compared once, whatever the length of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import heading

from steep.core.fingerprint import fingerprint
from steep.loader import Loader
from steep.order.batches import Sizes
from steep.order.data_order import NativeOrder, OrderedSource
from steep.store.manifest import MANIFEST_FILE, make_manifest
from steep.store.reader import open_store
from steep.store.writer import SIDECAR_DTYPE, describe_shard, open_shard

SEQUENCE_LENGTH, BATCH_SIZE, MEAN_TOKENS, SHARD_TOKENS = 2048, 8, 900, 50_000_000


def main() -> None:
    """Measure and print a Markdown section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        with_sums, without = Path(temporary) / "with", Path(temporary) / "without"
        write_store(with_sums, arguments.tokens)
        copy_without_sums(with_sums, without)
        seconds: dict[str, list[float]] = {"with": [], "without": []}
        opening: dict[str, list[float]] = {"with": [], "without": []}
        for number in range(2 * (arguments.repeats + 1)):
            way = "with" if number % 2 else "without"
            opened, read = read_epoch(Path(temporary) / way)
            if number > 1:  # the first of each way fills the page cache
                seconds[way].append(read)
                opening[way].append(opened)
            print(f"{way}: {read:.2f} s", file=sys.stderr, flush=True)
    print("## Checksums of blocks\n\n" + heading() + "\n")
    print("| One epoch | CPU seconds, median (range) | Million tokens/s | Opening, s |\n|---|---|---|---|")
    for way in ("without", "with"):
        middle = statistics.median(seconds[way])
        print(
            f"| {way} checksums | {middle:.3f} ({min(seconds[way]):.3f}-{max(seconds[way]):.3f}) | "
            f"{arguments.tokens / middle / 1e6:.1f} | {statistics.median(opening[way]):.3f} |"
        )
    pairs = [after / before - 1 for before, after in zip(seconds["without"], seconds["with"], strict=True)]
    low, high = min(pairs), max(pairs)
    cost = statistics.median(seconds["with"]) / statistics.median(seconds["without"]) - 1
    print(
        f"\nCost: {cost:.2%} of loading by the medians; {low:.2%} to {high:.2%} in single pairs: the noise of the machine."
    )


def write_store(folder: Path, tokens: int) -> None:
    """A store as `prepare` writes it, of random ids."""
    random = np.random.default_rng(0)
    folder.mkdir()
    shards = []
    for start in range(0, tokens, SHARD_TOKENS):
        count = min(SHARD_TOKENS, tokens - start)
        lengths = np.maximum(1, random.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, count // MEAN_TOKENS)).astype(np.int64)
        ids = random.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16)
        name = f"shard_{len(shards):05d}"
        with open_shard(folder, name, ids.dtype) as writer:
            writer.add_stored(ids, lengths, np.zeros(len(lengths), SIDECAR_DTYPE))
        shards.append(describe_shard(folder, name, writer))
    manifest = make_manifest(
        shards=shards, dtype="uint16", tokenizer={"fingerprint": "random"}, sources=[], settings={}, ledger={},
        max_token_id=49_999, files={},
    )  # fmt: skip
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def copy_without_sums(whole: Path, out: Path) -> None:
    """The same files under a manifest as an earlier steep wrote it."""
    out.mkdir()
    for path in whole.iterdir():
        if path.name != MANIFEST_FILE:
            (out / path.name).symlink_to(path)
    manifest = json.loads((whole / MANIFEST_FILE).read_text())
    del manifest["checksum"]
    for entry in manifest["shards"]:
        del entry["xxh3_blocks"]
    (out / MANIFEST_FILE).write_text(json.dumps({**manifest, "checksum": fingerprint(manifest)}))


def read_epoch(folder: Path) -> tuple[float, float]:
    """Seconds to open the store, and CPU seconds to read all of it once."""
    start = time.perf_counter()
    store = open_store(folder)
    opened = time.perf_counter() - start
    source = OrderedSource("all", None, store.document_lengths, store.fingerprint, None)
    order = NativeOrder([source], SEQUENCE_LENGTH, 1234)
    sizes = Sizes(SEQUENCE_LENGTH, BATCH_SIZE, BATCH_SIZE, order.sequences_per_epoch)
    loader = Loader(order, [store], sizes)
    start = time.process_time()
    for step in range(sizes.steps):
        loader.step_batches(step)
    return opened, time.process_time() - start


if __name__ == "__main__":
    main()
