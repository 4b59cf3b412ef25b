"""Text that the base model writes itself, for sources and validation texts whose path is `auto`.

In: a RunConfig, and what opens the base model and samples from it. Out: the same configuration with the paths of files. As replay
this is rehearsal without the old data (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"; for language models
Huang et al. 2024, arXiv:2403.01244). As a held-out text, the bits per byte that a run loses on it estimate how far the model has
moved from its base (the KL divergence). The text is cached under what decides it: the base's files, its tokenizer, the seed, the
length of documents and the version of the sampling code. Batches are cached one by one, so an interrupted run continues where it
stopped and a run that needs more text writes only the rest.
Weaknesses: the text is only as good as the base, which cannot write what it has forgotten; another kind of device or precision
would draw another text, so a run that moves to another machine takes its cache along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steep.checkpoint.load import verified_reference
from steep.config.run import RunConfig
from steep.core.cache_directory import default_cache_directory
from steep.core.errors import DataError
from steep.core.files import atomic_writer, read_json, write_json
from steep.core.fingerprint import fingerprint
from steep.core.progress import progress_when_needed
from steep.core.say import Say
from steep.core.section import SELF_GENERATED
from steep.models.config import ModelConfig
from steep.models.hf_config import pretrained_config
from steep.models.layers import max_positions
from steep.models.reference import is_gone, lasting_reference, resolve_reference
from steep.sources.config import SourceConfig
from steep.store.cache import HASH_MEMORY
from steep.store.file_hashes import hash_files
from steep.store.stream import StreamSource
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.open import tokenizer_reference

SAMPLING_VERSION = 1
"""Raised whenever the code that samples would write another text of the same base and seed; the cache then writes it again."""

BATCH_DOCUMENTS = 16
"""Documents written at a time. Part of what decides the text."""

_FILES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt")


@dataclass(frozen=True)
class BaseModel:
    """The base model of a run, and how it is sampled."""

    config: ModelConfig
    tokenizer: Any
    """The base's own tokenizer, of transformers."""
    max_tokens: int
    """Of a document, its end included."""
    seed: int
    device: str
    precision: str


DrawDocuments = Callable[[int], list[dict[str, Any]]]
"""From a seed to `BATCH_DOCUMENTS` documents, each with its `text`, its number of `tokens` and whether the model `ended` it."""
TextGenerator = Callable[[BaseModel], DrawDocuments]
"""Loads the base model. Called only where a text is not in the cache."""


class UnwrittenText(StreamSource):
    """A text that is not written yet, for `steep plan`: full sequences of as many tokens as asked for, which cannot be read."""

    def __init__(self, tokens: int, sequence_length: int, say: Say):
        self.fingerprint = "not written yet"
        self.lengths = np.full(math.ceil(tokens / sequence_length), sequence_length)
        self.max_token_id = 0
        say(f"the base model writes {tokens:,} tokens of replay before the first step of the run")


def is_self_generated(source: SourceConfig) -> bool:
    """Whether the base model is to write this text."""
    return source.path == SELF_GENERATED


def count_self_generated(run: RunConfig) -> int:
    """How many texts the base model is to write."""
    return sum(map(is_self_generated, (*run.data.train, *run.data.validation.values())))


def with_self_generated(run: RunConfig, say: Say, generator: TextGenerator | None = None) -> RunConfig:
    """The configuration with files in place of `auto`; says of each what it is and where it lies.

    generator: writes what is not in the cache. Without it, training sources that are not there stay `auto` and held-out texts are
    left out. Raises ConfigError for a tokenizer without a token to begin a document with, and what loading the model raises.
    """
    if not count_self_generated(run):
        return run
    data, base = run.data, Path(str(getattr(run.model, "pretrained", None))).name
    known = _of_lost_base(run)
    cache = _Cache(run, generator) if known is None else None

    def replaced(section: str, name: str, source: Any) -> Any:
        """The source with its file; as it is where it has one of its own or none is written."""
        if not is_self_generated(source):
            return source
        wanted = section + name, source.generate_tokens
        path = cache.text(*wanted) if cache is not None else _known_text(known or {}, *wanted)
        if path is None:
            return source
        about = read_json(path.with_suffix(".json"))
        say(
            f"data.{section}.{name}: {about['tokens']:,} tokens in {about['documents']:,} documents that {base} wrote itself, "
            f"{about['ended']:,} of them to their end: {path}"
        )
        return source.model_copy(update={"path": str(path), "name": source.name or SELF_GENERATED})

    train = [replaced("train", str(number), source) for number, source in enumerate(data.train)]
    texts = {name: replaced("validation", name, text) for name, text in data.validation.items()}
    validation = {name: text for name, text in texts.items() if not is_self_generated(text)}
    return run.model_copy(update={"data": data.model_copy(update={"train": train, "validation": validation})})


# ---- what a run remembers, so that it can go on after its base is gone ----


def _memory(run: RunConfig) -> Path:
    return Path(run.run.directory).expanduser() / run.run.name / "self_generated.json"


def remember_texts(run: RunConfig, written: RunConfig) -> None:
    """Note in the folder of the run, which exists, where the texts are that its base wrote. written: `run` with their paths."""
    base = lasting_reference(getattr(run.model, "pretrained", None))
    if not count_self_generated(run) or base is None or is_gone(base) or not _memory(run).parent.is_dir():
        return
    before, after = run.data, written.data
    pairs: list[tuple[str, SourceConfig, SourceConfig]] = [
        (f"train{number}", *pair) for number, pair in enumerate(zip(before.train, after.train, strict=True))
    ]
    pairs += [(f"validation{name}", text, after.validation[name]) for name, text in before.validation.items()]
    found = {name: str(new.path) for name, old, new in pairs if is_self_generated(old)}
    write_json(_memory(run), {"base": base, "texts": found})


def _of_lost_base(run: RunConfig) -> dict[str, str] | None:
    """The texts that the run's base wrote, if that base is gone; else None."""
    if not _memory(run).is_file():
        return None
    known = read_json(_memory(run))
    return known["texts"] if is_gone(str(known["base"])) else None


def _known_text(known: dict[str, str], name: str, wanted_tokens: int) -> Path:
    """A text that a lost base wrote. Raises DataError for one that is gone too, or that would have to be longer."""
    path = Path(known.get(name, ""))
    if name not in known or not path.is_file() or path.stem != str(wanted_tokens):
        raise DataError(
            f"the base model of the run is gone, so it cannot write {wanted_tokens:,} tokens again (path: auto); restore the "
            "base, or give the path of a text"
        )
    return path


class _Cache:
    """The texts of one run's base model; a generator loads the model at the first batch that is not there."""

    def __init__(self, run: RunConfig, generator: TextGenerator | None):
        self.base = _base_model(run)
        self._generator = generator
        self._draw: DrawDocuments | None = None
        cache = run.data.cache_directory
        self._folder = default_cache_directory() if cache is None else Path(cache).expanduser()
        self._identity = [
            _files_of(self.base.config, self._folder / HASH_MEMORY),
            self.base.config.quantize,
            fingerprint(json.loads(self.base.tokenizer.backend_tokenizer.to_str())),
            run.run.seed,
            self.base.max_tokens,
        ]

    def text(self, name: str, wanted_tokens: int) -> Path | None:
        """The text called `name`, of `wanted_tokens` and the rest of the last batch; None if nothing writes it.

        Its numbers are in a .json file beside it; documents that did not end themselves were cut after a whole sentence.
        """
        draw_key = fingerprint([name, BATCH_DOCUMENTS, *self._identity])
        folder = (
            self._folder
            / "written"
            / (draw_key if SAMPLING_VERSION == 1 else fingerprint([draw_key, SAMPLING_VERSION]))
        )
        path, about = folder / f"{wanted_tokens}.jsonl", folder / f"{wanted_tokens}.json"
        if not about.is_file():
            if self._generator is None:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            written = self._batches(folder, draw_key, wanted_tokens, self._generator)
            with atomic_writer(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(
                    json.dumps({"text": document["text"]}, ensure_ascii=False) + "\n" for document in written
                )
            facts = {key: sum(document[key] for document in written) for key in ("tokens", "ended")}
            write_json(about, {"documents": len(written), **facts})
        return path

    def _batches(
        self, folder: Path, draw_key: str, wanted_tokens: int, generator: TextGenerator
    ) -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        with progress_when_needed("the base model writes text", "tokens") as show:
            tokens, number = 0, 0
            while tokens < wanted_tokens:
                path = folder / f"batch_{number:06d}.json"
                if not path.is_file():
                    self._draw = self._draw or generator(self.base)
                    write_json(path, self._draw(int(fingerprint([draw_key, number])[:15], 16)))
                batch = read_json(path)
                written += batch
                tokens += sum(document["tokens"] for document in batch)
                number += 1
                show(min(tokens, wanted_tokens), wanted_tokens)
        return written


def _base_model(run: RunConfig) -> BaseModel:
    assert isinstance(run.model, ModelConfig)  # checked with the configuration, as is the next
    assert run.model.pretrained is not None
    reference = verified_reference(run.model.pretrained)
    config = ModelConfig(pretrained=reference, revision=run.model.revision, quantize=run.model.quantize)
    revision = run.model.revision if run.tokenizer.pretrained is None else None
    room = max_positions(pretrained_config(reference, config.revision))
    length = run.data.sequence_length
    return BaseModel(
        config,
        load_hf_tokenizer(tokenizer_reference(run.tokenizer, run.model), revision),
        max_tokens=max(1, min(length, room or length) - 1),
        seed=run.run.seed,
        device=run.train.device,
        precision=run.train.precision,
    )


def _files_of(model: ModelConfig, memory: Path) -> Any:
    """What names the base's content: the hashes of its files, or its name on the hub."""
    assert model.pretrained is not None
    path = resolve_reference(model.pretrained)
    if path is None:
        return [model.pretrained, model.revision]
    paths = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _FILES)
    return [[file.name, hashed.sha256] for file, hashed in zip(paths, hash_files(paths, memory), strict=True)]
