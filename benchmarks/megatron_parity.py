"""Is `order: megatron` megatron-core's order? Random configurations, compared sample for sample in two processes.

    python benchmarks/megatron_parity.py [--configurations 300] [--seed 0] [--peer /path/to/python] [--out report.md]

--peer: a Python that can import megatron-core 0.19.2; without it an environment is made (about 1 GB, some minutes). The peer runs
its own `BlendedMegatronDatasetBuilder` on the same files; compared are the tokens, labels and loss mask of every sample of the
training and validation split, as steep's loader reads them, and every index array with its dtype. A third of the
configurations has no common index cache; in another third Megatron loads what steep wrote, in the last steep what Megatron wrote,
and no file may be rebuilt. Ends with 1 if anything differs. Random sequences have 0 to 400 tokens; in some files a document is
several of them, or none.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

VERSION = "0.19.2"
NEGATIVE_CUT = "assert sample_idx.min() >= 0"
"""Megatron stops here where the last validation sample is kept and an empty document is laid last; steep reads it."""
MOST_SAMPLES = 400
"""Of each split that are compared token for token; the index arrays are compared whole."""
TOKENIZER = {"class": "Tok", "name": "stub"}
CACHES = ("none", "steep writes", "megatron writes")


def main() -> int:
    """Run both sides and print a Markdown report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", type=Path, help="a Python with megatron-core")
    parser.add_argument("--out", type=Path, help="write the report there too")
    parser.add_argument("--run-peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_peer:
        return run_peer(arguments.run_peer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peer = arguments.peer or install_peer(folder / "environment")
        report, failed = compare(folder, peer, arguments.configurations, arguments.seed)
    print(report)
    if arguments.out:
        arguments.out.write_text(report + "\n", encoding="utf-8")
    return 1 if failed else 0


def install_peer(environment: Path) -> Path:
    """A virtual environment with megatron-core; its Python. The wheel for Python 3.11 says that it needs 3.12 and does not."""
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "pip"), "install", "-q"]
    subprocess.run([*pip, "torch==2.13.0", "numpy", "packaging"], check=True)
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", f"megatron-core=={VERSION}", "triton"], check=True)
    return environment / "bin" / "python"


# ---- configurations ----


def random_configuration(number: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """Files, written here, and settings under which both sides are asked for their samples."""
    place = folder / f"{number:04}"
    place.mkdir(parents=True)
    datasets = rng.choice([1, 1, 2, 3, 5])
    sequence_length = rng.choice([1, 2, 3, 4, 7, 8, 16, 33, 64, 128])
    weighted = rng.random() < 0.6
    own_splits = rng.random() < 0.2
    names = [str(place / f"d{k}") for k in range(datasets)]
    tokens = [write_dataset(Path(name), rng, sequence_length) for name in names]
    about = max(1, sum(tokens) // sequence_length)
    train = max(1, int(about * rng.choice([0.1, 0.5, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.7])))
    valid = rng.choice([1, 3, max(1, about // 10), about // 2 + 1])
    splits = ["99,1,0", "80,20", "0.9, 0.1, 0.0", "900,50,50", "1,0,0", "50,50,0", "7,2,1"]
    split = None if own_splits else rng.choice(splits)
    if split == "1,0,0":
        valid = 0
    if not weighted and rng.random() < 0.4:
        train, valid = None, None
    weights = [rng.choice([0.1, 0.3, 1.0, 7.0, rng.random() + 0.01]) for _ in names] if weighted else None
    blend: Any = {"prefixes": names, "weights": weights}
    if own_splits:
        cut = rng.randrange(1, datasets) if datasets > 1 else 1
        parts = [slice(0, cut), slice(cut, None) if datasets > 1 else slice(0, None)]
        blend = [{"prefixes": names[part], "weights": weights and weights[part]} for part in parts]
    return {
        "number": number,
        "blend": blend,
        "split": split,
        "sequence_length": sequence_length,
        "seed": rng.choice([0, 1, 1234, 2**31 - 1, rng.randrange(2**32)]),
        "train": train,
        "valid": valid,
        "add_extra_token": rng.random() < 0.75,
        "drop_last_partial_validation": rng.random() < 0.7,
        "surplus": rng.choice([0.005, 0.005, 0.0, 0.2]),
        "cache": CACHES[number % len(CACHES)],
        "cache_directory": str(place / "index-cache"),
    }  # fmt: skip


def write_dataset(prefix: Path, rng: random.Random, sequence_length: int) -> int:
    """A .bin/.idx pair of random lengths and ids; returns its tokens."""
    import numpy as np

    mean = rng.choice([1, 3, 20, 100, sequence_length])
    numbers = np.random.default_rng(rng.randrange(2**32))
    lengths = np.minimum(numbers.geometric(1 / mean, rng.randrange(1, 200)), 400)
    if rng.random() < 0.5:
        lengths[numbers.random(len(lengths)) < 0.2] = 0
    if rng.random() < 0.3:
        lengths[numbers.random(len(lengths)) < 0.5] = 1
    if not lengths.sum():
        lengths[0] = 5
    code, dtype = rng.choice([(8, "<u2"), (4, "<i4")])
    boundaries = np.arange(len(lengths) + 1)
    if rng.random() < 0.3:  # documents of several sequences, and of none
        inner = numbers.integers(0, len(lengths) + 1, rng.randrange(1, 20))
        boundaries = np.sort(np.concatenate([[0], inner, [len(lengths)]]))
    itemsize = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths) - lengths) * itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries))
    arrays = (lengths.astype("<i4"), pointers.astype("<i8"), boundaries.astype("<i8"))
    prefix.with_name(prefix.name + ".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    numbers.integers(1, 60_000, int(lengths.sum())).astype(dtype).tofile(prefix.with_name(prefix.name + ".bin"))
    return int(lengths.sum())


def can_be_built(configuration: dict[str, Any]) -> bool:
    """Whether every split has tokens, without which Megatron counts epochs of nothing for ever, and the test split a sample.

    Megatron builds the test split too and stops where it is too short for a blend; steep has no use for it.
    """
    from steep.order.megatron_index import TEST, parse_split, split_matrix, split_range
    from steep.store.reader import open_store

    if configuration["split"] is None:
        return True
    for prefix in configuration["blend"]["prefixes"]:
        lengths = open_store(prefix + ".idx", unit="sequences").document_lengths
        for split, bounds in enumerate(split_matrix(parse_split(configuration["split"]))):
            if bounds is not None:
                documents = split_range(bounds, len(lengths))
                needed = configuration["sequence_length"] + 1 if split == TEST else 1
                if lengths[documents.start : documents.stop].sum() < needed:
                    return False
    return True


# ---- steep's side ----


def steep_samples(configuration: dict[str, Any]) -> dict[str, Any]:
    """Arrays by name as `run_peer` writes them, or {"refused": message}; and {"messages": [...]}."""
    from functools import partial

    import numpy as np

    from steep.core.errors import SteepError
    from steep.loader import make_batch
    from steep.order.megatron import build_megatron_orders
    from steep.order.megatron_paths import Blend
    from steep.store.reader import open_store

    given = configuration["blend"]
    blends = Blend(**given) if isinstance(given, dict) else {
        split: Blend(**blend) for split, blend in zip(("train", "valid"), given, strict=True)
    }  # fmt: skip
    shared = configuration["cache"] != "none"
    said: list[str] = []
    try:
        data = build_megatron_orders(
            blends,
            configuration["split"],
            configuration["sequence_length"],
            configuration["seed"],
            configuration["train"],
            configuration["valid"],
            partial(open_store, unit="sequences"),
            cache_directory=configuration["cache_directory"] if shared else None,
            tokenizer_identifiers="" if configuration["cache"] == "megatron writes" else TOKENIZER,
            add_extra_token=configuration["add_extra_token"],
            drop_last_partial_validation=configuration["drop_last_partial_validation"],
            surplus=configuration["surplus"],
            say=said.append,
        )
    except SteepError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"messages": said}
    for name, order, stores in (("train", data.train, data.stores), ("valid", data.valid, data.valid_stores)):
        if order is None:
            continue
        found[f"{name}.length"] = np.array(order.num_sequences)
        for k, index in enumerate(order._indices):
            for array in ("document_index", "sample_index", "shuffle_index"):
                found[f"{name}.{k}.{array}"] = getattr(index, array)
        if order._blend is not None:
            found[f"{name}.dataset_index"], found[f"{name}.dataset_sample_index"] = order._blend
        count = min(order.num_sequences, MOST_SAMPLES)
        if count:
            taken = [order.sequence(i) for i in range(count)]
            batch = make_batch(taken, stores, order.sequence_length, document_mask=False)
            found[f"{name}.tokens"] = batch.input_ids.numpy()
            found[f"{name}.labels"] = batch.labels.numpy()
    return found


# ---- the peer's side; nothing of steep is imported there ----


def run_peer(folder: Path) -> int:
    """Megatron's arrays of every configuration, one .npz each, or a .txt with the error."""
    for name in ("configurations.json",):
        configurations = json.loads((folder / name).read_text())
    for configuration in configurations:
        out = folder / "peer" / f"{configuration['number']:04}"
        try:
            arrays = peer_samples(configuration)
        except Exception:  # noqa: BLE001 - whatever it is, it is compared with what steep says
            out.with_suffix(".txt").write_text(traceback.format_exc())
        else:
            import numpy as np

            np.savez(out.with_suffix(".npz"), **arrays)
    return 0


def peer_samples(configuration: dict[str, Any]) -> dict[str, Any]:
    """What `BlendedMegatronDatasetBuilder` builds and its datasets return."""
    import numpy as np
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    given = configuration["blend"]
    if isinstance(given, dict):
        blends = {"blend": (given["prefixes"], given["weights"]), "split": configuration["split"]}
    else:
        blends = {"blend_per_split": [*((blend["prefixes"], blend["weights"]) for blend in given), None]}
    shared = configuration["cache"] != "none"
    settings = GPTDatasetConfig(
        random_seed=configuration["seed"],
        sequence_length=configuration["sequence_length"],
        path_to_cache=configuration["cache_directory"] if shared else None,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=configuration["add_extra_token"],
        drop_last_partial_validation_sequence=configuration["drop_last_partial_validation"],
        mid_level_dataset_surplus=configuration["surplus"],
        **blends,
    )
    test = None if configuration["train"] is None else 0
    sizes = [configuration["train"], configuration["valid"], test]
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()
    found: dict[str, Any] = {}
    for name, dataset in zip(("train", "valid"), built[:2], strict=True):
        if dataset is None:
            continue
        parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
        found[f"{name}.length"] = np.array(len(dataset))
        for k, part in enumerate(parts):
            for array in ("document_index", "sample_index", "shuffle_index"):
                found[f"{name}.{k}.{array}"] = getattr(part, array)
        if isinstance(dataset, BlendedDataset):
            found[f"{name}.dataset_index"] = dataset.dataset_index
            found[f"{name}.dataset_sample_index"] = dataset.dataset_sample_index
        items = []
        for i in range(min(len(dataset), MOST_SAMPLES)):
            for (
                part
            ) in parts:  # else the padding of the first sample that is read stays masked in all others: a defect of it
                part.masks_and_position_ids_are_cached = False
            items.append(dataset[i])
        if items:
            found[f"{name}.tokens"] = np.stack([item["tokens"].numpy() for item in items])
            labels = np.stack([item["labels"].numpy() for item in items])
            masks = np.stack([item["loss_mask"].numpy() for item in items])
            found[f"{name}.labels"] = np.where(masks > 0, labels, -100)
    return found


class Tokenizer:
    """What Megatron's datasets ask of a tokenizer."""

    vocab_size = 60_000
    eod = eos = 0
    unique_identifiers = TOKENIZER

    @property
    def pad(self) -> int:
        """There is none, as with GPT-2's."""
        raise NotImplementedError


# ---- comparison ----


def compare(folder: Path, peer: Path, count: int, seed: int) -> tuple[str, bool]:
    """The report, and whether anything differs."""
    from common import heading

    rng = random.Random(seed)
    configurations: list[dict[str, Any]] = []
    number = 0
    while len(configurations) < count:
        configuration = random_configuration(number, rng, folder)
        number += 1
        if can_be_built(configuration):
            configurations.append(configuration)
    (folder / "configurations.json").write_text(json.dumps(configurations))
    (folder / "peer").mkdir()
    start = time.perf_counter()
    first = [c for c in configurations if c["cache"] == "steep writes"]
    ours = {c["number"]: steep_samples(c) for c in first}
    written = {c["number"]: cache_files(c) for c in first}
    steep_seconds = time.perf_counter() - start
    subprocess.run([str(peer), __file__, "--run-peer", str(folder)], check=True, stderr=subprocess.DEVNULL)
    after = {c["number"]: cache_files(c) for c in configurations}
    start = time.perf_counter()
    ours.update({c["number"]: steep_samples(c) for c in configurations if c["cache"] != "steep writes"})
    steep_seconds += time.perf_counter() - start
    differences, refused, defects, samples, arrays = [], 0, 0, 0, 0
    for configuration in configurations:
        found, where = ours[configuration["number"]], folder / "peer" / f"{configuration['number']:04}"
        problems, compared = differing(found, where)
        arrays += compared
        stopped = (folder / "peer" / f"{configuration['number']:04}.txt").exists()
        if stopped and not problems:
            refused += "refused" in found
            defects += "refused" not in found
        elif configuration["cache"] == "steep writes" and not problems:
            before, now = written[configuration["number"]], after[configuration["number"]]
            changed = sorted(name for name in now if now[name] != before.get(name) and "-test-" not in name)
            problems += [f"Megatron did not use steep's {name}" for name in changed if asked_for(name, configuration)]
        elif configuration["cache"] == "megatron writes" and not problems:
            now = cache_files(configuration)
            changed = sorted(name for name in now if now[name] != after[configuration["number"]].get(name))
            problems += [f"steep did not use Megatron's {name}" for name in changed]
        if not problems and not stopped:
            samples += sum(len(value) for key, value in found.items() if key.endswith(".tokens"))
        if problems:
            differences.append((configuration, problems))
    lines = [
        "## Megatron parity",
        "",
        heading(),
        f"- megatron-core {VERSION}; seed {seed}",
        "",
        f"{len(configurations)} random configurations, **{len(differences)} with a difference**: {samples:,} samples and "
        f"{arrays:,} index arrays compared. {refused} configurations are refused by both, for datasets shorter than a "
        f"sequence; {defects} end in an assertion of Megatron's, where the last validation sample is kept and an empty "
        "document is laid last.",
        "",
        table_of(configurations, ours, differences),
        "",
        f"steep's side took {steep_seconds:.0f} s.",
    ]
    for configuration, problems in differences[:20]:
        lines += ["", f"- {json.dumps(configuration)}", *(f"  - {problem}" for problem in problems[:6])]
    return "\n".join(lines), bool(differences)


def asked_for(name: str, configuration: dict[str, Any]) -> bool:
    """Whether steep was asked for the index of this file: Megatron also builds validation of no samples."""
    return "-valid-" not in name or configuration["valid"] != 0


def cache_files(configuration: dict[str, Any]) -> dict[str, tuple[int, bytes]]:
    """Every file of the configuration's cache: when it was written, and what is in it."""
    folder = Path(configuration["cache_directory"])
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.glob("*"))}


def differing(found: dict[str, Any], where: Path) -> tuple[list[str], int]:
    """What differs between the two sides, in words, and how many index arrays were compared."""
    import numpy as np

    error = where.with_suffix(".txt")
    if error.exists():
        last = " | ".join(error.read_text().strip().splitlines()[-3:])
        if NEGATIVE_CUT in last:
            return [], 0
        return ([] if "refused" in found else [f"only Megatron refuses: {last}"]), 0
    if "refused" in found:
        return [f"only steep refuses: {found['refused']}"], 0
    problems = [f"message: {message}" for message in found["messages"] if "is not used" in message]
    compared = 0
    with np.load(where.with_suffix(".npz")) as theirs:
        names = {name for name in theirs.files if name.split(".")[0] in {key.split(".")[0] for key in found}}
        if names != found.keys() - {"messages"}:
            problems.append(f"other arrays: {sorted(names ^ (found.keys() - {'messages'}))}")
        for name in sorted(names & found.keys()):
            mine, other = np.asarray(found[name]), theirs[name]
            if name.endswith(".labels") and mine.shape == other.shape:
                mine = np.where(labels_compared(other, mine), mine, other)
            if name.endswith("index"):
                compared += 1
                if mine.dtype != other.dtype:
                    problems.append(f"{name}: dtype {mine.dtype} instead of {other.dtype}")
            if mine.shape != other.shape or not np.array_equal(mine, other):
                problems.append(f"{name}: differs, shapes {mine.shape} and {other.shape}")
    return problems, compared


def labels_compared(theirs: Any, mine: Any) -> Any:
    """All labels but the last of a sample that Megatron drew without the extra token: it has none there, steep may."""
    import numpy as np

    compared = np.ones(mine.shape, dtype=bool)
    if theirs.shape == mine.shape and len(theirs) and (theirs[:, -1] == -100).all():
        compared[:, -1] = False
    return compared


def table_of(configurations: list[dict[str, Any]], ours: dict[int, Any], differences: list[Any]) -> str:
    """How many configurations had what, so that the number above means something."""
    from common import table

    different = {configuration["number"] for configuration, _ in differences}
    kinds: dict[str, Any] = {
        "one dataset": lambda c: isinstance(c["blend"], dict) and len(c["blend"]["prefixes"]) == 1,
        "blend of several": lambda c: isinstance(c["blend"], dict) and len(c["blend"]["prefixes"]) > 1,
        "datasets of their own for each split": lambda c: isinstance(c["blend"], list),
        "weights": lambda c: bool(blends_of(c)[0]["weights"]),
        "no weights": lambda c: not blends_of(c)[0]["weights"],
        "no weights, no size (one epoch)": lambda c: c["train"] is None,
        "several epochs": lambda c: has(ours[c["number"]], lambda found: epochs_of(found) > 1),
        "with the extra token": lambda c: c["add_extra_token"],
        "without the extra token": lambda c: not c["add_extra_token"],
        "last validation sample kept": lambda c: not c["drop_last_partial_validation"],
        **{f"cache: {name}": (lambda c, name=name: c["cache"] == name) for name in CACHES},
    }
    rows = []
    for name, holds in kinds.items():
        chosen = [c for c in configurations if holds(c)]
        rows.append([name, f"{len(chosen)}", f"{sum(c['number'] in different for c in chosen)}"])
    return table(["configurations", "number", "different"], rows)


def blends_of(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """Its blends, one or one for each split."""
    given = configuration["blend"]
    return [given] if isinstance(given, dict) else given


def has(found: dict[str, Any], holds: Any) -> bool:
    """Whether something holds of samples that were not refused."""
    return "refused" not in found and holds(found)


def epochs_of(found: dict[str, Any]) -> int:
    """The most often that a document of the first training dataset is laid out."""
    import numpy as np

    laid = found["train.0.document_index"]
    return int(np.unique(laid, return_counts=True)[1].max()) if len(laid) else 1


if __name__ == "__main__":
    sys.exit(main())
