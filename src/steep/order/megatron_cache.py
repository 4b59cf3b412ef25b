"""Megatron's index cache: the same file names and bytes, so that either program can use what the other one built.

`{md5}-GPTDataset-{split}-{description.txt,document_index.npy,sample_index.npy,shuffle_index.npy}`, and for blends
`{md5}-BlendedDataset-{split}-{description.txt,dataset_index.npy,dataset_sample_index.npy}`. The md5 is that of the description:
path as given, sizes, seed, split and tokenizer. It does not name the content, so Megatron keeps using a stale index after a file
was rewritten. Here no index is trusted: what is read is checked against the documents (`index_damage`) and built anew where it
does not fit. Every file is written completely or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.core.arrays import write_array
from steep.core.files import atomic_writer, write_text
from steep.core.say import Say
from steep.order.megatron_blend import blend_all, blend_by_weights, sample_numbers
from steep.order.megatron_index import (
    SPLIT_NAMES,
    IndexSettings,
    SampleIndex,
    SplitMatrix,
    build_index,
    index_damage,
)

_INDEX_FILES = ("document_index", "sample_index", "shuffle_index")
_BLEND_FILES = ("dataset_index", "dataset_sample_index")
_CHECKED_POSITIONS = 1000


@dataclass(frozen=True)
class Identity:
    """What Megatron's names of cache files are made of."""

    seed: int
    sequence_length: int
    split: str | None
    """As given; None where every split has its own paths."""
    matrix: SplitMatrix | None
    tokenizer: Mapping[str, Any] | str
    """`unique_identifiers` of Megatron's tokenizer; a string is the name that NeMo Automodel puts there."""

    def of_dataset(self, path: str, num_samples: int | None, split: int) -> dict[str, Any]:
        """The description of one dataset, keys in the order that is hashed."""
        return {
            "class": "GPTDataset",
            "dataset_path": path,
            "num_samples": num_samples,
            "index_split": SPLIT_NAMES[split],
            **({"tokenizer": self.tokenizer} if isinstance(self.tokenizer, str) else {}),
            "random_seed": self.seed,
            "sequence_length": self.sequence_length,
            "split": self.split,
            "split_matrix": self.matrix,
            **({} if isinstance(self.tokenizer, str) else {"tokenizer": dict(self.tokenizer)}),
        }


def tokenizer_of_cache(directory: Path, paths: Sequence[str], identity: Identity) -> Mapping[str, Any] | str | None:
    """How the tokenizer is named in an index that another program left for one of these datasets, seed, length and split.

    With that name indices for other sizes are found too, and those written here are found there. None where there is none.
    """
    for path in sorted(directory.glob("*-GPTDataset-*-description.txt")):
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            split, matrix = described["split"], described["split_matrix"]
            found = (described["dataset_path"], described["random_seed"], described["sequence_length"], split)
            tokenizer = described["tokenizer"]
        except (OSError, ValueError, TypeError, KeyError):
            continue  # no description that Megatron would find either
        same = found[0] in paths and found[1:] == (identity.seed, identity.sequence_length, identity.split)
        if same and isinstance(tokenizer, (dict, str)) and json.dumps(matrix) == json.dumps(identity.matrix):
            return tokenizer
    return None


def blend_description(
    datasets: Sequence[Mapping[str, Any]], split: int, weights: Sequence[float], size: int | None
) -> dict[str, Any]:
    """The description of a blend. weights: normalized, or the sizes of the datasets where all of each is taken."""
    return {
        "class": "BlendedDataset",
        "datasets": [dict(dataset) for dataset in datasets],
        "split": SPLIT_NAMES[split],
        "weights": list(weights),
        "size": size,
    }


def description_hash(description: Mapping[str, Any]) -> str:
    """The md5 that the files are named by: that of the content of description.txt."""
    return hashlib.md5(_description_text(description).encode("utf-8"), usedforsecurity=False).hexdigest()


def _description_text(description: Mapping[str, Any]) -> str:
    return json.dumps(description, indent=4)


@dataclass
class IndexCache:
    """A folder of index files, None to write nothing; `say` is told of files that are damaged or stale."""

    directory: Path | None
    say: Say

    def index(
        self,
        description: Mapping[str, Any],
        lengths: NDArray[Any],
        documents: range,
        num_samples: int | None,
        settings: IndexSettings,
    ) -> SampleIndex:
        """The index of a dataset: from the cache where it fits the documents, else built."""

        def damage(laid: NDArray[Any], cuts: NDArray[Any], shuffle: NDArray[Any]) -> str | None:
            return index_damage(SampleIndex(laid, cuts, shuffle, lengths, settings), documents, num_samples)

        def build() -> list[NDArray[Any]]:
            index = build_index(lengths, documents, num_samples, settings)
            return [index.document_index, index.sample_index, index.shuffle_index]

        laid, cuts, shuffle = self._stored_or_built(description, _INDEX_FILES, damage, build)
        return SampleIndex(laid, cuts, shuffle, lengths, settings)

    def blend(
        self, description: Mapping[str, Any], weights: Sequence[float], size: int | None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Dataset and sample of every position of a blend: from the cache where it fits, else built."""

        def build() -> tuple[NDArray[Any], NDArray[Any]]:
            return blend_all([int(weight) for weight in weights]) if size is None else blend_by_weights(weights, size)

        damage = partial(_blend_damage, weights=weights, size=size)
        datasets, samples = self._stored_or_built(description, _BLEND_FILES, damage, build)
        return datasets, samples

    def _stored_or_built(
        self,
        description: Mapping[str, Any],
        names: Sequence[str],
        damage: Callable[..., str | None],
        build: Callable[[], Sequence[NDArray[Any]]],
    ) -> Sequence[NDArray[Any]]:
        """The arrays of these files where `damage` finds none in them, else what `build` gives, which is stored."""
        if self.directory is None:
            return build()
        split = description.get("index_split") or description["split"]
        stem = f"{description_hash(description)}-{description['class']}-{split}"
        about = self.directory / f"{stem}-description.txt"
        paths = [self.directory / f"{stem}-{name}.npy" for name in names]
        if all(path.is_file() for path in (about, *paths)):
            try:
                stored = [np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in paths]
            except (OSError, ValueError, EOFError) as error:
                why: str | None = f"it cannot be read ({error})"
            else:
                why = damage(*stored)
                if why is None:
                    return stored
            self.say(f"{self.directory / stem}-*: the stored index is not used and will be rebuilt: {why}")
        built = build()
        self.directory.mkdir(parents=True, exist_ok=True)
        for path, array in zip(paths, built, strict=True):
            with atomic_writer(path) as file:
                write_array(file, array)
        write_text(about, _description_text(description))
        return built


def _blend_damage(
    datasets: NDArray[Any], samples: NDArray[Any], weights: Sequence[float], size: int | None
) -> str | None:
    """Why a stored blend is not that of these weights, or None. Its beginning and its counts are checked."""
    expected = sum(int(weight) for weight in weights) if size is None else size
    if datasets.shape != (expected,) or samples.shape != (expected,):
        return "it has another size"
    if expected and (datasets.min() < 0 or datasets.max() >= len(weights)):
        return "it names datasets that are not there"
    if not np.array_equal(samples, sample_numbers(datasets, len(weights))):
        return "its samples are not numbered in order"
    if size is None:
        counts = np.bincount(datasets, minlength=len(weights)).tolist()
        return None if counts == [int(weight) for weight in weights] else "it does not hold every sample once"
    first, _ = blend_by_weights(weights, min(size, _CHECKED_POSITIONS))
    return None if np.array_equal(datasets[: len(first)], first) else "it follows other weights"
