"""Tries one family: a tiny base is planned, trained two steps, resumed, exported and loaded back, with and without an adapter.

In: a family of transformers, a tokenizer and a token store. Out: a Trial for each of full training and LoRA. Everything runs in
this process through the functions behind the commands; the export is loaded back by transformers alone. "Resumed" means that the
second step, taken again from the checkpoint of the first, has the same loss and gradient norm to the last bit.
"""

from __future__ import annotations

import io
import json
import pydoc_data.topics
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import steep
from families.tiny import VOCAB, tiny_config
from steep.core.errors import SteepError
from steep.exporters.format import Options
from steep.exporters.parity import answer, check, compare
from steep.exporters.run import ask_trained, open_task
from steep.models.hf_config import quiet_transformers

CORPUS = "corpus.jsonl"
STAGES = ("built", "planned", "trained", "resumed", "exported")
ADAPTERS: dict[str, dict[str, Any] | None] = {"full": None, "lora": {"rank": 2}}
READ_AS_THEIR_OWN = ("qwen2", "qwen3_5_moe", "qwen3_5_moe_text")
"""Families beside whose config.json transformers reads every tokenizer as theirs: they get it so, and text in place of tokens."""
SAID = ("documents:", "attention:", "not trained:", "loss:")
"""Beginnings of the console's lines that the table is about."""


@dataclass
class Trial:
    """What became of one way to train a family."""

    family: str
    adapter: str
    attention: str = ""
    """How its documents are kept apart: document, packed with a mask, or rows."""
    done: list[str] = field(default_factory=list)
    """The stages that were passed."""
    refused: str = ""
    """The error for a person, if there was one."""
    crashed: str = ""
    """Any other error: a fault of steep or of transformers."""
    said: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether all stages were passed."""
        return set(STAGES) <= set(self.done)


def families() -> list[str]:
    """The model types of transformers' mapping of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@contextmanager
def workshop() -> Iterator[tuple[Path, Path, Path]]:
    """A scratch folder (in memory where there is /dev/shm: checkpoints are synced to disk), a tokenizer and a store of short
    documents, so that every sequence has several."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        folder = Path(scratch)
        texts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]
        pieces = [text[start : start + 40] for text in texts for start in range(0, len(text), 40)]
        corpus = folder / CORPUS
        corpus.write_text("\n".join(json.dumps({"text": piece}) for piece in pieces if piece.strip()))
        _train_tokenizer(texts).save_pretrained(folder / "tokenizer")
        steep.prepare(str(corpus), tokenizer=str(folder / "tokenizer"), out=str(folder / "store"), workers=1)
        yield folder, folder / "tokenizer", folder / "store"


def _train_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def try_family(family: str, folder: Path, tokenizer: Path, store: Path) -> list[Trial]:
    """Full training and LoRA of a family, in a folder below `folder` that is removed. Errors are in the trials."""
    from transformers import AutoModelForCausalLM

    trials = [Trial(family, adapter) for adapter in ADAPTERS]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        base = Path(scratch) / "base"
        try:
            torch.manual_seed(0)
            with quiet_transformers():
                AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(base)
        except Exception as error:  # noqa: BLE001 - whatever a family does, the others are tried
            for trial in trials:
                trial.crashed = _describe(error)
            return trials
        source = store
        if family in READ_AS_THEIR_OWN:
            shutil.copytree(tokenizer, base, dirs_exist_ok=True)
            tokenizer, source = base, folder / CORPUS
        for trial in trials:
            trial.done.append("built")
            try:
                _try(trial, _mapping(base, tokenizer, source, Path(scratch), trial.adapter))
            except SteepError as error:
                trial.refused = str(error).replace(str(base), f"tiny {family}")
            except Exception as error:  # noqa: BLE001 - as above
                trial.crashed = _describe(error)
    return trials


def resume_fresh(family: str, folder: Path, tokenizer: Path, store: Path) -> None:
    """Train fresh weights of a family, and again from the checkpoint of the first step. Raises a SteepError for a family that
    steep does not train so, AssertionError where the steps differ."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tiny_config(family).save_pretrained(Path(scratch) / "architecture")
        mapping = _mapping(Path(scratch), tokenizer, store, Path(scratch), "full")
        mapping["model"] = {"config": str(Path(scratch) / "architecture")}
        assert list(_train_and_resume(mapping, io.StringIO())) == ["trained", "resumed"]


def _describe(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _mapping(base: Path, tokenizer: Path, source: Path, directory: Path, adapter: str) -> dict[str, Any]:
    mapping: dict[str, Any] = {
        "run": {"name": adapter, "directory": str(directory), "seed": 7},
        "model": {"pretrained": str(base)},
        "tokenizer": {"pretrained": str(tokenizer)},
        "data": {"sequence_length": 32, "train": [{"path": str(source)}], "cache_directory": str(directory)},
        "train": {"global_batch_size": 2, "micro_batch_size": 2, "steps": 2, "threads": 1, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every_steps": 1, "keep_last": 2, "asynchronous": False},
        "report": {"enabled": False},
    }
    return mapping if ADAPTERS[adapter] is None else {**mapping, "adapter": ADAPTERS[adapter]}


def _try(trial: Trial, mapping: dict[str, Any]) -> None:
    run = Path(mapping["run"]["directory"]) / mapping["run"]["name"]
    console = io.StringIO()
    try:
        steep.plan(mapping)
        trial.done.append("planned")
        for stage in _train_and_resume(mapping, console):
            trial.done.append(stage)
            trial.attention = _attention(run)
    finally:
        lines = dict.fromkeys(line for line in console.getvalue().splitlines() if line.startswith(SAID))
        trial.said = list(lines)
    _export(run)
    trial.done.append("exported")


def _train_and_resume(mapping: dict[str, Any], console: io.StringIO) -> Iterator[str]:
    """Yields "trained" and "resumed" as they are reached. Raises AssertionError where the steps differ."""
    run = Path(mapping["run"]["directory"]) / mapping["run"]["name"]
    steep.train(mapping, stream=console)
    yield "trained"
    first = _losses(run)
    shutil.rmtree(run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text().strip())
    steep.train(mapping, stream=console)
    assert _losses(run) == first, f"resumed, the steps gave {_losses(run)}, uninterrupted {first}"
    yield "resumed"


def _attention(run: Path) -> str:
    newest = run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text().strip()
    choice = json.loads((newest / "train_state.json").read_text())["model_choice"]
    return "rows" if choice["apart"] else choice["attention"]


def _losses(run: Path) -> dict[int, tuple[float, float]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}


def _export(run: Path) -> None:
    """As `steep export --to hf --dtype float32`, but loaded back in this process, which saves its start. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    with open_task(str(run), "hf", Options(dtype="float32"), say=lambda line: None) as (exporter, task):
        ask_trained(task)
        expected = exporter.write(task, run / "export")
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(run / "export", dtype="auto").eval()
        found = answer(model, task.questions, "transformers")
        parity = compare(task.trained, expected, found, task.questions.texts)
        check(parity, expected, exporter.DTYPES["float32"], found.greedy, "the export")
