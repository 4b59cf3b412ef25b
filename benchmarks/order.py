"""How fast a run knows its order, and how fast it reads batches: steep against megatron-core 0.19.2, on the same files.

    python benchmarks/order.py [--documents 20000000] [--batches 400] [--repeats 3] [--peer /path/to/python]

--peer: a Python with megatron-core 0.19.2; without it an environment is made. Order: a synthetic store of `--documents` lengths,
log-normal with a mean of about 900 tokens, the .bin a sparse file; seconds from the files to the first batch of 8 x 2,048,
imports not counted, and the peak memory of the process beyond its imports. Batches: 8 x 2,048 tokens of a store of 180 M random
tokens in the page cache, in the order of each program; steep reads in the calling thread, Megatron's GPTDataset in one worker of
torch's DataLoader. Resume: the same to the batch of step 0, a million and a billion. Padding: of one epoch of `--store`.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MEAN_TOKENS, SEQUENCE_LENGTH, BATCH_SIZE, SEED = 900, 2048, 8, 1234
BATCH_DOCUMENTS = 200_000


def main() -> None:
    """Measure and print a Markdown section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="a Python with megatron-core")
    parser.add_argument("--store", type=Path, help="a prepared token store of a real corpus, for its padding")
    parser.add_argument("--skip-order", action="store_true")
    parser.add_argument("--skip-batches", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("WAY", "PREFIX", "NUMBER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, prefix, number = arguments.worker
        print(json.dumps(WORKERS[way](prefix, int(number))))
        return
    from common import heading

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peer = arguments.peer or install_peer(folder / "environment")
        print("## Order\n\n" + heading() + "\n- megatron-core 0.19.2", flush=True)
        if not arguments.skip_order:
            print("\n" + order_table(folder, peer, arguments.documents, arguments.repeats), flush=True)
            print("\n" + resume_table(folder, arguments.documents, arguments.repeats), flush=True)
        if arguments.store:
            print("\n" + padding_table(arguments.store), flush=True)
        if not arguments.skip_batches:
            print("\n" + batches_table(folder, peer, arguments.batches, arguments.repeats), flush=True)


def install_peer(environment: Path) -> Path:
    """An environment with the peer."""
    from megatron_parity import install_peer as install

    return install(environment)


# ---- files ----


def write_lengths(prefix: Path, documents: int, sparse: bool) -> None:
    """A .bin/.idx pair of u16 tokens. sparse: the .bin has the right size and nothing in it."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, documents), 1).astype("<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * 2
    with open(prefix.with_name(prefix.name + ".idx"), "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        for array in (lengths, pointers, np.arange(documents + 1, dtype="<i8")):
            array.tofile(file)
    tokens = int(lengths.sum(dtype=np.int64))
    with open(prefix.with_name(prefix.name + ".bin"), "wb") as file:
        if sparse:
            file.truncate(2 * tokens)
        else:
            rng.integers(1, 50_000, tokens, dtype=np.uint16).tofile(file)


# ---- steep ----


def native_order(store: Any, packing: str) -> Any:
    """The native order of one store."""
    from steep.order.data_order import NativeOrder, OrderedSource

    source = OrderedSource("store", None, store.document_lengths, store.fingerprint)
    return NativeOrder([source], SEQUENCE_LENGTH, SEED, packing=packing)


def parity_order(prefix: str, cache: Path | None) -> tuple[Any, Any]:
    """Megatron's order of one store, one epoch of it, and the store."""
    from functools import partial

    from steep.order.megatron import build_megatron_orders
    from steep.store.reader import open_store

    data = build_megatron_orders(
        prefix,
        "100,0,0",
        SEQUENCE_LENGTH,
        SEED,
        None,
        0,
        partial(open_store, unit="sequences"),
        cache_directory=cache,
        tokenizer_identifiers=Tokenizer.unique_identifiers,
    )
    return data.train, data.stores[0]


def steep_order(prefix: str, packing: str) -> dict[str, float]:
    """Open, lay out natively, first batch."""
    from steep.loader import make_batch
    from steep.store.reader import open_store

    import_memory = peak_bytes()
    start = time.perf_counter()
    store = open_store(prefix)
    order = native_order(store, packing)
    make_batch([order.sequence(i) for i in range(BATCH_SIZE)], [store], SEQUENCE_LENGTH)
    return {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - import_memory, "written": 0}


def steep_first_batch(prefix: str, step: int) -> dict[str, float]:
    """Open, lay out natively, the batch of one step of 8 sequences."""
    from steep.loader import make_batch
    from steep.store.reader import open_store

    start = time.perf_counter()
    store = open_store(prefix)
    order = native_order(store, "best_fit")
    first = step * BATCH_SIZE
    make_batch([order.sequence(first + i) for i in range(BATCH_SIZE)], [store], SEQUENCE_LENGTH)
    return {"seconds": time.perf_counter() - start}


def steep_padding(prefix: str, packing: str) -> dict[str, float]:
    """What the packing of one epoch does to documents: padding, and cuts of documents that would fit."""
    import numpy as np

    from steep.store.reader import open_store

    store = open_store(prefix)
    order = native_order(store, packing)
    pieces = np.zeros(store.num_documents, dtype=np.int64)
    tokens = 0
    for index in range(order.sequences_per_epoch):
        for document, _, count in order.sequence(index).ranges:
            pieces[document] += 1
            tokens += count
    lengths = store.document_lengths
    fits = (lengths > 0) & (lengths <= SEQUENCE_LENGTH)
    return {
        "tokens": int(lengths.sum()),
        "dropped": int(lengths.sum()) - tokens,
        "padding": 1 - tokens / (order.sequences_per_epoch * SEQUENCE_LENGTH),
        "cut": float((pieces[fits] > 1).mean()),
    }


def steep_parity(prefix: str, cache: Path | None) -> dict[str, float]:
    """Open, lay out as Megatron does, first batch."""
    from steep.loader import make_batch
    from steep.order import megatron  # noqa: F401 - imports are not counted

    import_memory = peak_bytes()
    before = size_of(cache)
    start = time.perf_counter()
    order, store = parity_order(prefix, cache)
    make_batch([order.sequence(i) for i in range(BATCH_SIZE)], [store], SEQUENCE_LENGTH, document_mask=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak_bytes() - import_memory, "written": size_of(cache) - before}


def steep_batches(prefix: str, batches: int, packing: str) -> dict[str, float]:
    """Tokens per second of the loader, in the calling thread."""
    import torch

    from steep.loader import Loader
    from steep.order.batches import Sizes
    from steep.store.reader import open_store

    torch.set_num_threads(1)
    store = open_store(prefix)
    if packing == "megatron":
        order, store = parity_order(prefix, None)
    else:
        order = native_order(store, packing)
    sizes = Sizes(SEQUENCE_LENGTH, BATCH_SIZE, BATCH_SIZE, (batches + 20) * BATCH_SIZE)
    loader = Loader(order, [store], sizes, document_mask=packing != "megatron")
    for step in range(20):
        loader.step_batches(step)
    start = time.perf_counter()
    tokens = sum(
        batch.input_ids.numel() for step in range(20, 20 + batches) for batch in loader.step_batches(step).batches
    )
    return {"tokens_per_second": tokens / (time.perf_counter() - start)}


# ---- megatron-core; nothing of steep is imported there ----


class Tokenizer:
    """What Megatron's datasets ask of a tokenizer."""

    vocab_size = 60_000
    eod = eos = 0
    unique_identifiers = {"class": "Tokenizer"}  # noqa: RUF012 - Megatron reads it from the instance


def megatron_dataset(prefix: str, cache: str, create_attention_mask: bool) -> Any:
    """One epoch of one file."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    settings = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=create_attention_mask,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, settings).build()[0]


def megatron_order(prefix: str, cache: str) -> dict[str, float]:
    """Open, build the index files, first batch."""
    import megatron.core.datasets.blended_megatron_dataset_builder
    import megatron.core.datasets.helpers  # noqa: F401 - imports are not counted

    import_memory = peak_bytes()
    before = size_of(Path(cache))
    start = time.perf_counter()
    dataset = megatron_dataset(prefix, cache, False)
    for i in range(BATCH_SIZE):
        dataset[i]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak_bytes() - import_memory, "written": size_of(Path(cache)) - before}


def megatron_batches(prefix: str, batches: int, create_attention_mask: bool) -> dict[str, float]:
    """Tokens per second of GPTDataset behind a DataLoader with one worker."""
    import torch

    torch.set_num_threads(1)
    dataset = megatron_dataset(prefix, prefix + ".cache", create_attention_mask)
    order = [range(i * BATCH_SIZE, (i + 1) * BATCH_SIZE) for i in range(batches + 20)]
    loader = iter(torch.utils.data.DataLoader(dataset, batch_sampler=order, num_workers=1))
    for _ in range(20):
        next(loader)
    start = time.perf_counter()
    tokens = sum(batch["tokens"].numel() for batch in loader)
    return {"tokens_per_second": tokens / (time.perf_counter() - start)}


# ---- measuring ----


def peak_bytes() -> int:
    """The largest resident set of this process so far, pages of mapped files included."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size_of(folder: Path | None) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*")) if folder and folder.is_dir() else 0


def cache_of(prefix: str, number: int) -> Path:
    """A folder for index files: one for each number."""
    return Path(f"{prefix}.cache{number}")


WORKERS: dict[str, Any] = {
    "steep_best_fit": lambda prefix, number: steep_order(prefix, "best_fit"),
    "steep_concat": lambda prefix, number: steep_order(prefix, "concat"),
    "steep_parity": lambda prefix, number: steep_parity(prefix, None),
    "steep_parity_cached": lambda prefix, number: steep_parity(prefix, cache_of(prefix, number)),
    "steep_first_batch": steep_first_batch,
    "steep_padding_best_fit": lambda prefix, number: steep_padding(prefix, "best_fit"),
    "steep_padding_concat": lambda prefix, number: steep_padding(prefix, "concat"),
    "megatron": lambda prefix, number: megatron_order(prefix, str(cache_of(prefix, number))),
    "steep_batches_best_fit": lambda prefix, number: steep_batches(prefix, number, "best_fit"),
    "steep_batches_concat": lambda prefix, number: steep_batches(prefix, number, "concat"),
    "steep_batches_megatron": lambda prefix, number: steep_batches(prefix, number, "megatron"),
    "megatron_batches": lambda prefix, number: megatron_batches(prefix, number, False),
    "megatron_batches_masks": lambda prefix, number: megatron_batches(prefix, number, True),
}


def worker(python: Path | str, way: str, prefix: Path, number: int) -> dict[str, Any]:
    """What a way measured in a process of its own."""
    from common import last_json, run_process

    command = [str(python), str(Path(__file__).resolve()), "--worker", way, str(prefix), str(number)]
    return last_json(run_process(command, {"OMP_NUM_THREADS": "1"}).output)


def order_table(folder: Path, peer: Path, documents: int, repeats: int) -> str:
    """Seconds to the first batch of each way."""
    from common import spread, table, taking_turns

    prefix = folder / "lengths"
    write_lengths(prefix, documents, sparse=True)
    tokens = os.path.getsize(f"{prefix}.bin") // 2
    numbers = iter(range(1000))
    ways = {
        "megatron-core: builds and writes its index": lambda: worker(peer, "megatron", prefix, next(numbers)),
        "megatron-core: its index is there": lambda: worker(peer, "megatron", prefix, 0),
        "steep native, best_fit": lambda: worker(sys.executable, "steep_best_fit", prefix, 0),
        "steep native, concat": lambda: worker(sys.executable, "steep_concat", prefix, 0),
        "steep order: megatron, no cache": lambda: worker(sys.executable, "steep_parity", prefix, 0),
        "steep order: megatron, Megatron's index, verified": lambda: worker(sys.executable, "steep_parity_cached", prefix, 0),
    }  # fmt: skip
    found = taking_turns(ways, repeats)
    rows = [
        [
            name,
            spread([result["seconds"] for result in results], ".2f"),
            spread([result["bytes"] / 2**20 for result in results]),
            f"{max(result['written'] for result in results) / 2**20:,.0f}",
        ]
        for name, results in found.items()
    ]
    head = f"{documents:,} documents, {tokens:,} tokens, sequences of {SEQUENCE_LENGTH:,}; open files to first batch of 8:\n\n"
    return head + table(["way", "seconds", "peak memory beyond imports, MiB", "written, MiB"], rows)


def batches_table(folder: Path, peer: Path, batches: int, repeats: int) -> str:
    """Tokens per second of each way."""
    import statistics

    from common import spread, table, taking_turns

    prefix = folder / "tokens"
    write_lengths(prefix, BATCH_DOCUMENTS, sparse=False)
    here, few = sys.executable, max(20, batches // 10)
    ways = {
        "megatron-core, attention masks (default)": lambda: worker(peer, "megatron_batches_masks", prefix, few),
        "megatron-core, no attention masks": lambda: worker(peer, "megatron_batches", prefix, batches),
        "steep native, best_fit, document masks": lambda: worker(here, "steep_batches_best_fit", prefix, batches),
        "steep native, concat, document masks": lambda: worker(here, "steep_batches_concat", prefix, batches),
        "steep order: megatron": lambda: worker(here, "steep_batches_megatron", prefix, batches),
    }  # fmt: skip
    found = {
        name: [result["tokens_per_second"] for result in results]
        for name, results in taking_turns(ways, repeats).items()
    }
    base = statistics.median(found["megatron-core, no attention masks"])
    rows = [
        [name, spread([value / 1e6 for value in values], ".2f"), f"{statistics.median(values) / base:.2f}"]
        for name, values in found.items()
    ]
    return f"batches of {BATCH_SIZE} x {SEQUENCE_LENGTH:,}:\n\n" + table(["way", "M tokens/s", "x"], rows)


def resume_table(folder: Path, documents: int, repeats: int) -> str:
    """Seconds to the first batch at the start and deep in the data, each in a process of its own."""
    from common import spread, table, taking_turns

    prefix = folder / "lengths"
    if not prefix.with_name("lengths.idx").exists():
        write_lengths(prefix, documents, sparse=True)
    steps = (0, 1_000_000, 1_000_000_000)
    ways = {
        f"{step:,}": lambda step=step: worker(sys.executable, "steep_first_batch", prefix, step)  # type: ignore[misc]
        for step in steps
    }
    found = taking_turns(ways, repeats)
    rows = [[name, spread([result["seconds"] for result in results], ".2f")] for name, results in found.items()]
    head = f"open files to first batch of 8 x {SEQUENCE_LENGTH:,}, {documents:,} documents, best_fit:\n\n"
    return head + table(["at step", "seconds"], rows)


def padding_table(store: Path) -> str:
    """Padding, dropped tokens and cut documents of one epoch of a prepared corpus."""
    from common import table

    rows = []
    for packing in ("best_fit", "concat"):
        found = worker(sys.executable, f"steep_padding_{packing}", store, 0)
        cells = [f"{found['tokens']:,}", f"{found['dropped']:,}", f"{found['padding']:.4%}", f"{found['cut']:.2%}"]
        rows.append([packing, *cells])
    head = f"one epoch of {store.name} at {SEQUENCE_LENGTH:,}:\n\n"
    return head + table(["packing", "tokens", "dropped", "padding", "documents cut that would fit"], rows)


if __name__ == "__main__":
    main()
