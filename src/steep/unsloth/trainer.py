"""UnslothTrainer: a notebook's dataset and settings as a steep run that trains the notebook's own model object.

Main choice: the batch. A notebook counts documents, one padded row each. steep packs them, and that many full sequences would
hold some ten times the documents, so that an epoch would have a tenth of the updates at the same learning rate. A step here
therefore holds about as many documents as was asked for; `packing=True`, as in TRL, counts sequences.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from steep.config.load import load_run_config
from steep.config.run import RunConfig
from steep.core.errors import ConfigError, DataError
from steep.core.files import atomic_writer, read_json
from steep.models.hf_config import quiet_transformers
from steep.optim.param_groups import embedding_tensors
from steep.order.batches import DocumentBatches, batches_of_documents
from steep.parallelize.activation_checkpoint import keep_activations
from steep.runtime.tuning import tune_process
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import text_tokenizer
from steep.trackers.backends.jsonl import read_records
from steep.unsloth.arguments import UnslothTrainingArguments
from steep.unsloth.model import NotebookState, inner, notebook_state
from steep.unsloth.translate import check_keys, refuse, say, say_ignored

CALL = "UnslothTrainer"

SAMPLE_DOCUMENTS = 2000
"""Number of documents, evenly spaced, that are encoded to learn how long documents are."""

MEANS_NOTHING = {
    "dataset_num_proc": "text is read by steep's own processes",
    "data_collator": "batches are made by steep: packed documents, next-token labels",
    "compute_metrics": "held-out text is scored in bits per byte",
    "preprocess_logits_for_metrics": "logits never exist whole",
    "dataset_kwargs": "text is tokenized as it is",
    "formatting_prompts_func": "",
}
CANNOT = {
    "callbacks": "use metrics.jsonl, trackers and the report of the run",
    "optimizers": "name one with optim, or use optimizer: {_target_: ...} in a steep configuration",
    "peft_config": "get_peft_model adds the adapter",
    "model_init": "the model is given",
}
KEYS = ("processing_class", "eval_dataset", "formatting_func", "dataset_text_field", "max_seq_length", "packing")


class UnslothTrainer:
    """Trains `model` in place. Every call of `train` is a run of steep in `<output_dir>/run-<N>`.

    train_dataset, eval_dataset: a datasets.Dataset, a list of mappings, any iterable of those, or a path of text that steep
    reads. Raises ConfigError for arguments that are unknown or cannot be done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        train_dataset: Any = None,
        args: UnslothTrainingArguments | None = None,
        **given: Any,
    ):
        check_keys(CALL, given, [*KEYS, *MEANS_NOTHING, *CANNOT])
        refuse(CALL, given, CANNOT)
        self.model = model
        self.args = args or UnslothTrainingArguments()
        self.notebook: NotebookState = notebook_state(model)
        self.tokenizer = tokenizer or given.get("processing_class") or self.notebook.tokenizer
        if len(self.tokenizer) != self.notebook.vocabulary_size:
            raise ConfigError(
                f"the tokenizer has {len(self.tokenizer):,} tokens, and had {self.notebook.vocabulary_size:,} when the model was "
                "loaded. New tokens need embeddings: use `vocabulary` in a steep configuration"
            )
        if self.notebook.adapter is None and not self.notebook.full_finetuning:
            raise ConfigError(
                "no parameter is trainable: add an adapter (FastLanguageModel.get_peft_model), or load with "
                "full_finetuning=True"
            )
        say_ignored(CALL, given, MEANS_NOTHING)
        if train_dataset is None:
            raise ConfigError(f"{CALL}: train_dataset is missing")
        self._field = given.get("dataset_text_field") or self.args.dataset_text_field or "text"
        self._format: Callable[[Any], Any] | None = given.get("formatting_func")
        self._length = (
            given.get("max_seq_length")
            or self.args.max_seq_length
            or self.args.max_length
            or self.notebook.max_seq_length
        )
        packing = given.get("packing")
        self._packing = bool(self.args.packing if packing is None else packing)
        self._datasets = {"train": train_dataset, "eval": given.get("eval_dataset")}
        self.run_directory: Path | None = None
        """Of the newest run: checkpoints, metrics.jsonl, report.html, config.yaml."""
        self.state = SimpleNamespace(log_history=[], global_step=0)

    def configuration(self) -> RunConfig:
        """The steep configuration that `train` runs. Writes the datasets into `<output_dir>/data/`."""
        mapping = self.args.sections()
        folder = Path(mapping["run"]["directory"]).expanduser()
        free = (f"run-{number}" for number in itertools.count(1) if not (folder / f"run-{number}").exists())
        mapping["run"]["name"] = self.args.run_name or next(free)
        mapping["model"] = self.notebook.config.model_dump(mode="json")
        if self.notebook.adapter is not None:
            mapping["adapter"] = self.notebook.adapter.model_dump(mode="json")
        checkpointing = self.args.gradient_checkpointing
        mapping["train"] |= {
            "precision": self._precision(),
            "threads": torch.get_num_threads(),  # as the notebook has them
            "activation_checkpointing": self.notebook.checkpointing if checkpointing is None else bool(checkpointing),
        }
        path, texts = self._write(folder, "train")
        batches = self._batches(texts)
        sizes = ("global_batch_size", "micro_batch_size")
        mapping["train"] |= {size: getattr(batches, size) for size in sizes}
        mapping["data"] = {
            "sequence_length": batches.sequence_length,
            "cache_directory": str(folder / "cache"),
            "train": [{"path": path, "name": "train_dataset"}],
        }
        if self._datasets["eval"] is not None:
            mapping["data"]["validation"] = {"eval_dataset": {"path": self._write(folder, "eval")[0]}}
        return load_run_config(mapping=mapping)

    def _precision(self) -> str:
        """What the arguments ask for; fp16 only where it is fast, on a GPU."""
        if self.args.bf16:
            return "mixed_bf16"
        return "mixed_fp16" if self.args.fp16 and torch.cuda.is_available() else self.notebook.precision

    def _batches(self, texts: list[str]) -> DocumentBatches:
        """The batch of a step, and a line that says how it follows from the notebook's."""
        per_pass, passes = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        asked = per_pass * passes
        if self._packing or not texts:
            why = "packing=True" if self._packing else "it is not known how many documents a path holds"
            say(f"batch sizes count sequences of {self._length:,} tokens ({why})")
            return DocumentBatches(self._length, asked, per_pass, float(asked * self._length))
        tokenizer = text_tokenizer(self.notebook.tokenizer, TokenizerConfig())
        sample = texts[:: max(1, len(texts) // SAMPLE_DOCUMENTS)]
        lengths = [max(1, len(ids)) for ids in tokenizer.encode_documents(sample)]
        found = batches_of_documents(per_pass, passes, lengths, self._length)
        number = found.global_batch_size
        say(
            f"{asked} documents per step are about {found.tokens_per_step:,.0f} tokens; packed, not padded, a step is "
            f"{number} sequence{'s' if number > 1 else ''} of {found.sequence_length:,} tokens (packing=True: {asked} of "
            f"{self._length:,})"
        )
        return found

    def train(self, resume_from_checkpoint: Any = None) -> Any:
        """Train; transformers' TrainOutput, whose `metrics` have train_runtime (seconds) and more.

        Raises ConfigError if it is to resume: the run is a run of steep, and `steep train` resumes it.
        """
        from transformers.trainer_utils import TrainOutput

        from steep.training.loop import train  # it imports every stage

        if resume_from_checkpoint:
            newest = self.run_directory or Path(self.args.output_dir) / "run-1"
            raise ConfigError(
                f"a run is resumed by `steep train {newest}/config.yaml --resume`, then loaded by from_pretrained('{newest}')"
            )
        if self.args.fp16 and (precision := self._precision()) != "mixed_fp16":
            say(f"fp16 is slow on a CPU: this run computes in {precision}")
        config = self.configuration()
        tune_process()
        model = inner(self.model)
        if self.notebook.adapter is not None and self.args.embedding_learning_rate is None and embedding_tensors(model):
            say(
                "embedding_learning_rate is not given: embeddings and output head train with a tenth of learning_rate here "
                "(in Unsloth with learning_rate itself)"
            )
        try:
            result = train(config, resume=False, model=model)
        finally:
            keep_activations(model)
        self.run_directory = self.notebook.run_directory = result.run_directory
        lines = [record for record in read_records(result.run_directory / "metrics.jsonl") if record["kind"] == "train"]
        self.state.log_history, self.state.global_step = lines, result.step
        mean = sum(line["loss"] for line in lines) / len(lines)
        metrics = {
            "train_runtime": result.seconds,
            "train_steps_per_second": result.step / result.seconds,
            "train_tokens_per_second": result.tokens / result.seconds,
            "train_tokens": result.tokens,
            "train_loss": mean,
            "peak_memory_bytes": max(line["memory_bytes"] for line in lines),
        }
        return TrainOutput(result.step, mean, metrics)

    def memory_plot(self) -> Any:
        """A matplotlib figure: the planned memory of the newest run, part by part, beside what it took."""
        from steep.reporting.plots import memory_plot  # matplotlib is heavy

        if self.run_directory is None:
            raise ConfigError("call train() first")
        plan = read_json(self.run_directory / "plan.json")
        return memory_plot(plan["memory"], max(line["memory_bytes"] for line in self.state.log_history))

    def save_model(self, output_dir: str) -> None:
        """The adapter (or the whole model) and the tokenizer, as transformers and peft write them."""
        with quiet_transformers():
            self.model.save_pretrained(output_dir)
        self.tokenizer.save_pretrained(output_dir)

    def _write(self, folder: Path, name: str) -> tuple[str, list[str]]:
        """The path of the dataset as JSONL, named by its content, and its texts; a path is used as it is, without texts."""
        dataset = self._datasets[name]
        if isinstance(dataset, (str, Path)):
            return str(dataset), []
        eos = self.tokenizer.eos_token
        given = list(self._texts(dataset))
        if not given:
            raise DataError(f"{CALL}: the {name} dataset has no rows")
        texts = [text.removesuffix(eos or "") for text in given]
        ended = sum(text != whole for text, whole in zip(texts, given, strict=True))
        if ended:
            say(f"{ended:,} of {len(texts):,} documents ended with {eos!r}; steep ends every document with it once")
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        content = lines.encode("utf-8", "surrogatepass")
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / "data" / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
        with atomic_writer(path) as file:
            file.write(content)
        return str(path), texts

    def _texts(self, dataset: Iterable[Any]) -> Iterator[str]:
        for number, row in enumerate(dataset):
            if self._format is not None:
                made = self._format(row)
            elif isinstance(row, Mapping) and self._field in row:
                made = row[self._field]
            elif isinstance(row, str):
                made = row
            else:
                has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
                raise DataError(
                    f"{CALL}: row {number} has no field {self._field!r} (it has: {has}); name it with dataset_text_field"
                )
            for text in made if isinstance(made, list) else [made]:
                if not isinstance(text, str):
                    raise DataError(f"{CALL}: row {number} gives {type(text).__name__}, but text is needed")
                yield text
