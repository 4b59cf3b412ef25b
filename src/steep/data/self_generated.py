"""Text that the base model writes itself, for sources and validation texts whose path is `auto`.

In: a RunConfig. Out: the same with the paths of files. As replay this is rehearsal without the old data (Robins 1995,
"Catastrophic forgetting, rehearsal and pseudorehearsal"; for language models Huang et al. 2024, arXiv:2403.01244); as a
validation text, the bits per byte that a run loses on it estimate how far the model has moved from its base (the KL divergence).
The text is kept in the cache under what decides it: the base's files, its tokenizer, the seed, and the length of documents;
batches of it one by one, so that an interrupted run goes on where it was and a run that needs more text writes the rest only.
Weaknesses: only as good as the base, which has forgotten what it cannot say; a device or a precision of another kind would draw
another text, so that a run that moves takes its cache along.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steep.checkpoint.load import verified_reference
from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.core.files import atomic_writer, read_json, write_json
from steep.core.fingerprint import fingerprint
from steep.core.progress import progress_when_needed
from steep.core.section import SELF_GENERATED
from steep.models.config import ModelConfig
from steep.order.config import TrainSourceConfig, ValidationConfig
from steep.sources.config import SourceConfig
from steep.store.boundaries import default_cache_directory
from steep.store.cache import HASH_MEMORY
from steep.store.file_hashes import hash_files
from steep.store.stream import StreamSource

BATCH_DOCUMENTS = 16
"""Documents written at a time. Part of what decides the text."""

LEAST_KEPT_RATIO = 0.5
"""A document that reached its greatest length is cut after its last whole sentence, if that keeps so much of it."""

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n")
_FILES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt")


class UnwrittenText(StreamSource):
    """A source whose text is not written yet, for plans: full sequences of as many tokens as are asked for, not to be read."""

    def __init__(self, tokens: int, sequence_length: int):
        self.fingerprint = "not written yet"
        self.lengths = np.full(math.ceil(tokens / sequence_length), sequence_length)
        self.max_token_id = 0
        self.messages = [f"the base model writes {tokens:,} tokens of replay before the first step of the run"]


def is_self_generated(source: SourceConfig) -> bool:
    """Whether the base model is to write this text."""
    return source.path == SELF_GENERATED


def count_self_generated(run: RunConfig) -> int:
    """How many texts the base model is to write."""
    return sum(map(is_self_generated, (*run.data.train, *run.data.validation.values())))


def with_self_generated(run: RunConfig, *, write: bool = True) -> tuple[RunConfig, list[str]]:
    """The configuration with files in the place of `auto`, and a line for each: what it is and where it lies.

    write: let the base model write what is not in the cache; else training sources stay `auto` and validation texts are left out.
    Raises ConfigError for a tokenizer without a token to begin a document with, and what loading the model raises.
    """
    data = run.data
    sources: list[tuple[tuple[str, str], TrainSourceConfig | ValidationConfig]] = [
        *((("train", str(place)), source) for place, source in enumerate(data.train)),
        *((("validation", name), text) for name, text in data.validation.items()),
    ]
    asked = {place: source for place, source in sources if is_self_generated(source)}
    if not asked:
        return run, []
    writer = _Writer(run)
    found = {place: writer.text(place[0] + place[1], source.generate_tokens, write) for place, source in asked.items()}
    train = [_replaced(source, found.get(("train", str(i)))) for i, source in enumerate(data.train)]
    validation = {
        name: _replaced(text, found.get(("validation", name)))
        for name, text in data.validation.items()
        if ("validation", name) not in asked or found[("validation", name)] is not None
    }
    base = str(run.model.pretrained)  # type: ignore[union-attr]  # checked with the configuration
    messages = [
        f"data.{section}.{name}: {text.line(base)}" for (section, name), text in found.items() if text is not None
    ]
    return run.model_copy(update={"data": data.model_copy(update={"train": train, "validation": validation})}), messages


def _replaced(source: Any, text: WrittenText | None) -> Any:
    return (
        source
        if text is None
        else source.model_copy(update={"path": str(text.path), "name": source.name or SELF_GENERATED})
    )


@dataclass(frozen=True)
class WrittenText:
    """A text that the base wrote."""

    path: Path
    documents: int
    tokens: int
    ended: int
    """Documents that the model ended itself; the others were cut after a whole sentence."""

    def line(self, base: str) -> str:
        """For the person at the terminal."""
        return (
            f"{self.tokens:,} tokens in {self.documents:,} documents that {Path(base).name} wrote itself, "
            f"{self.ended:,} of them to their end: {self.path}"
        )


class _Writer:
    """Writes the texts of one run; loads the model at the first batch that is not in the cache."""

    def __init__(self, run: RunConfig):
        from steep.tokenizer.open import load_hf_tokenizer, tokenizer_reference

        assert isinstance(run.model, ModelConfig)  # checked with the configuration, as is the next
        assert run.model.pretrained is not None
        self._run = run
        self._config = ModelConfig(
            pretrained=verified_reference(run.model.pretrained),
            revision=run.model.revision,
            quantize=run.model.quantize,
        )
        own = run.tokenizer.pretrained is None
        self._tokenizer = load_hf_tokenizer(
            tokenizer_reference(run.tokenizer, run.model), run.model.revision if own else None
        )
        cache = run.data.cache_directory
        self._cache = default_cache_directory() if cache is None else Path(cache).expanduser()
        self._max_tokens = self._longest()
        self._identity = [
            _files_of(self._config, self._cache / HASH_MEMORY),
            self._config.quantize,
            fingerprint(json.loads(self._tokenizer.backend_tokenizer.to_str())),
            run.run.seed,
            self._max_tokens,
        ]
        self._model: Any = None

    def text(self, name: str, wanted_tokens: int, write: bool) -> WrittenText | None:
        """The text called `name`, of `wanted_tokens` and the rest of the last batch; None if it is not there and is not to be."""
        key = fingerprint([name, BATCH_DOCUMENTS, *self._identity])
        folder = self._cache / "written" / key
        path, about = folder / f"{wanted_tokens}.jsonl", folder / f"{wanted_tokens}.json"
        if not about.is_file():
            if not write:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            written = self._batches(folder, key, wanted_tokens)
            with atomic_writer(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(
                    json.dumps({"text": document["text"]}, ensure_ascii=False) + "\n" for document in written
                )
            facts = {
                "documents": len(written),
                "tokens": sum(document["tokens"] for document in written),
                "ended": sum(document["ended"] for document in written),
            }
            write_json(about, facts)
        return WrittenText(path, **read_json(about))

    def _batches(self, folder: Path, key: str, wanted_tokens: int) -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        with progress_when_needed("the base model writes text", "tokens") as show:
            tokens, number = 0, 0
            while tokens < wanted_tokens:
                path = folder / f"batch_{number:06d}.json"
                if not path.is_file():
                    write_json(path, self._sample(int(fingerprint([key, number])[:15], 16)))
                batch = read_json(path)
                written += batch
                tokens += sum(document["tokens"] for document in batch)
                number += 1
                show(min(tokens, wanted_tokens), wanted_tokens)
        return written

    def _sample(self, seed: int) -> list[dict[str, Any]]:
        from steep.evaluation.generate import end_of_text_ids
        from steep.evaluation.sample import sample_documents

        if self._model is None:
            self._model = self._load()
        ends = end_of_text_ids(self._model, self._tokenizer.eos_token_id)
        sampled = sample_documents(
            self._model,
            self._start_id(),
            ends,
            count=BATCH_DOCUMENTS,
            max_tokens=self._max_tokens,
            vocab_size=len(self._tokenizer),
            seed=seed,
        )
        return [self._document(ids, ids[-1] in ends) for ids in sampled]

    def _document(self, ids: list[int], ended: bool) -> dict[str, Any]:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {"text": text if ended else _whole_sentences(text), "tokens": len(ids), "ended": ended}

    def _load(self) -> Any:
        from steep.models.load import load_model
        from steep.runtime.device import choose_device, choose_precision, frozen_dtype

        device = choose_device(self._run.train.device)
        dtype = frozen_dtype(choose_precision(self._run.train.precision, device.type))
        return load_model(self._config, dtype=dtype, device=device, seed=self._run.run.seed)

    def _start_id(self) -> int:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ConfigError(
            "data: path auto lets the base model write text, and its tokenizer has neither a BOS nor an EOS token to begin a "
            "document with; name a text of your own"
        )

    def _longest(self) -> int:
        from steep.models.layers import max_positions
        from steep.models.load import pretrained_config

        room = max_positions(pretrained_config(str(self._config.pretrained), self._config.revision))
        length = self._run.data.sequence_length
        return max(1, min(length, room or length) - 1)


def _whole_sentences(text: str) -> str:
    """A text that was cut somewhere, cut after its last whole sentence or line; as it is where that keeps too little."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends and ends[-1] >= LEAST_KEPT_RATIO * len(text) else text


def _files_of(model: ModelConfig, memory: Path) -> Any:
    """What names the base's content: the hashes of its files, or its name on the hub."""
    from steep.models.load import resolve_reference

    assert model.pretrained is not None
    path = resolve_reference(model.pretrained)
    if path is None:
        return [model.pretrained, model.revision]
    paths = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _FILES)
    return [[file.name, hashed.sha256] for file, hashed in zip(paths, hash_files(paths, memory), strict=True)]
