"""Tokens per second and peak memory of `steep train` against transformers' Trainer.

    pip install -r benchmarks/requirements.txt
    python benchmarks/throughput.py [--models gpt2 llama] [--repeats 5] [--steps 12] [--skip 4] [--document-tokens 512]

Same architecture, batch (4 x 512 tokens), precision and cores; random ids; dropout 0; AdamW, clipping at 1.0; no
evaluation. steep: the whole command. Trainer: as users run it, with plain malloc and transformers' default attention (sdpa).
A run's speed is its median step, from the end of one step to the end of the next, the first `--skip` steps left out;
peak memory is the whole process's resident set, imports, building the model and (steep) the checkpoint at the end included.
Where the CPU has bf16 both run in bf16 autocast and Trainer also in fp32; elsewhere all run in fp32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    SIZES,
    heading,
    last_json,
    run_process,
    spread,
    steep_model,
    steep_train,
    table,
    taking_turns,
    train_lines,
    transformers_model,
    write_store,
    write_tokenizer,
)

BATCH, TOKENS = 4, 512
PLAIN_MALLOC = {"STEEP_TUNE_ALLOCATOR": None, "THP_MEM_ALLOC_ENABLE": None, "LD_PRELOAD": None}


def main() -> None:
    """Measure and print a Markdown section."""
    arguments = parse()
    if arguments.trainer is not None:
        trainer_worker(arguments.trainer, arguments.models[0], arguments.steps, arguments.skip)
        return
    print(heading(), flush=True)
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + compare(model, arguments, Path(folder)), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=4)
    parser.add_argument("--document-tokens", type=int, default=TOKENS, help="steep's documents; Trainer has none")
    parser.add_argument("--only", nargs="+", help="of the ways, those whose names contain one of these")
    parser.add_argument("--trainer", choices=["fp32", "mixed_bf16"], help=argparse.SUPPRESS)  # the worker's own call
    return parser.parse_args()


def compare(model: str, arguments: argparse.Namespace, folder: Path) -> str:
    """One model's table."""
    from steep.runtime.device import cpu_has_bf16

    precision = "mixed_bf16" if cpu_has_bf16() else "fp32"
    write_tokenizer(folder / "tokenizer", SIZES[model]["vocab_size"])
    documents = (arguments.steps + 2) * BATCH * TOKENS // arguments.document_tokens
    write_store(folder / "store", SIZES[model]["vocab_size"], arguments.document_tokens, documents)
    ours, theirs = f"steep {precision}", f"Trainer {precision}"
    ways = {
        theirs: partial(measure_trainer, model, precision, arguments),
        ours: partial(measure_steep, model, precision, arguments, folder, {}),
        f"{ours}, compiled": partial(measure_steep, model, precision, arguments, folder, {"compile": True}),
    }
    if precision != "fp32":
        ways["Trainer fp32"] = partial(measure_trainer, model, "fp32", arguments)
    if arguments.only:
        ways = {name: way for name, way in ways.items() if any(part in name for part in arguments.only)}
    results = taking_turns(ways, arguments.repeats)
    return f"### {model}, {precision}, {arguments.repeats} runs each\n\n{report(results, next(iter(ways)))}"


def report(results: dict[str, list[dict[str, Any]]], reference: str) -> str:
    """Every way's speed and memory, and their ratios to the first."""

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    rows = [
        [
            name,
            spread([run["tokens_per_second"] for run in runs]),
            f"{median(name, 'tokens_per_second') / median(reference, 'tokens_per_second'):.2f}",
            spread([run["peak_bytes"] / 1e6 for run in runs]),
            f"{median(name, 'peak_bytes') / median(reference, 'peak_bytes'):.2f}",
        ]
        for name, runs in results.items()
    ]
    return table(["way", "tokens/s: median (min-max)", "x", "peak resident MB", "x"], rows)


def rate(ends: list[float], skip: int) -> float:
    """Tokens per second of the median step, from the times at which steps ended."""
    steps = [stop - start for start, stop in itertools.pairwise(ends[skip:])]
    return BATCH * TOKENS / statistics.median(steps)


# ---- steep ----


def measure_steep(
    model: str, precision: str, arguments: argparse.Namespace, folder: Path, train: dict[str, Any]
) -> dict[str, Any]:
    """One run of the command."""
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        mapping = {
            "run": {"name": "measured", "directory": runs},
            "model": steep_model(model),
            "tokenizer": {"pretrained": str(folder / "tokenizer")},
            "data": {"sequence_length": TOKENS, "train": [{"path": str(folder / "store.bin")}]},
            "train": {
                "global_batch_size": BATCH,
                "steps": arguments.steps,
                "precision": precision,
                "device": "cpu",
                **train,
            },
            "report": {"enabled": False},
        }
        finished = steep_train(mapping, Path(runs), PLAIN_MALLOC)  # the command tunes the allocator itself
        lines = train_lines(Path(runs) / "measured")
    ends = [line["time"] for line in lines]
    return {"tokens_per_second": rate(ends, arguments.skip), "peak_bytes": finished.peak_bytes}


# ---- transformers' Trainer ----


def measure_trainer(model: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of this script as Trainer's process."""
    sizes = ["--steps", str(arguments.steps), "--skip", str(arguments.skip)]
    command = [sys.executable, __file__, "--trainer", precision, "--models", model, *sizes]
    finished = run_process(command, PLAIN_MALLOC)
    return {**last_json(finished.output), "peak_bytes": finished.peak_bytes}


def trainer_worker(precision: str, model: str, steps: int, skip: int) -> None:
    """Train with transformers' Trainer and print the rate as JSON."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *positional: Any, **named: Any) -> None:
            self.ends.append(time.time())

    class RandomIds(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.ids = torch.randint(1, SIZES[model]["vocab_size"], (steps * BATCH, TOKENS))

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.ids[index], "labels": self.ids[index]}

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=3e-4, weight_decay=0.1,
            bf16=precision == "mixed_bf16", use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(transformers_model(model), settings, train_dataset=RandomIds(), callbacks=[clock]).train()
    print(json.dumps({"tokens_per_second": rate(clock.ends, skip)}))


if __name__ == "__main__":
    main()
