"""The peak memory that `steep plan` predicts against what `steep train` takes, on a CPU.

    pip install -r benchmarks/requirements.txt
    python benchmarks/memory_plan.py [--only smollm2 gpt2] [--steps 4] [--threads 1]

Measured is the largest resident set of the command less that of an empty process: one that has imported torch, transformers and
steep's training loop. The difference must be at most 15 %. Columns show where the peak lies: after step 0, after the last step
and at the end, when the checkpoint has been written. No validation text, no samples: their memory is not in the plan.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    SIZES,
    heading,
    run_process,
    steep_model,
    steep_train,
    table,
    train_lines,
    write_store,
    write_tokenizer,
)
from startup import smollm2

EMPTY = """
from steep.runtime.tuning import tune_allocator
tune_allocator()
import torch, transformers, steep.training.loop
from transformers import GPT2LMHeadModel, LlamaForCausalLM
"""
LIMIT = 0.15
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "smollm2 8 x 256": ("smollm2", 8, 256, {}),
    "smollm2 2 x 512": ("smollm2", 2, 512, {}),
    "smollm2 2 x 512, saving while training": ("smollm2", 2, 512, {"checkpoint": {"every_steps": 2}}),
    "smollm2 8 x 256 as 4 x 2": ("smollm2", 8, 256, {"train": {"micro_batch_size": 2}}),
    "smollm2 8 x 256, activation checkpointing": ("smollm2", 8, 256, {"train": {"activation_checkpointing": True}}),
    "gpt2 30M 4 x 512": ("gpt2", 4, 512, {}),
    "gpt2 30M 4 x 512, saving while training": ("gpt2", 4, 512, {"checkpoint": {"every_steps": 2}}),
    "gpt2 30M 16 x 512": ("gpt2", 16, 512, {}),
}
"""Model, sequences and tokens of a batch, and what else the configuration says."""


def main() -> None:
    """Measure, print a Markdown section, exit with 1 if a prediction is off by more than 15 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="cases whose names contain one of these")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, help="train.threads; one is faster on a machine that is busy otherwise")
    arguments = parser.parse_args()
    print(heading(), flush=True)
    empty = run_process([sys.executable, "-c", EMPTY]).peak_bytes
    print(f"- empty process: {empty / 1e6:,.0f} MB; all below is in MB over it\n", flush=True)
    rows, worst = [], 0.0
    for name, case in CASES.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        row, error = measure(name, case, arguments, empty)
        worst = max(worst, abs(error))
        rows.append(row)
        print(f"  {row}", file=sys.stderr, flush=True)
    header = ["run", "predicted", "measured", "predicted / measured", "after step 0", "after the last step", "parts"]
    print(table(header, rows))
    sys.exit(worst > LIMIT)


def measure(
    name: str, case: tuple[str, int, int, dict[str, Any]], arguments: argparse.Namespace, empty: int
) -> tuple[list[str], float]:
    """One row, and the prediction's relative error."""
    from steep import plan

    model, batch, tokens, changes = case
    vocabulary = 49152 if model == "smollm2" else SIZES[model]["vocab_size"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_store(folder / "store", vocabulary, tokens, (arguments.steps + 1) * batch)
        mapping: dict[str, Any] = {
            "run": {"name": "memory", "directory": temporary},
            "data": {"sequence_length": tokens, "train": [{"path": str(folder / "store.bin")}]},
            "train": {
                "global_batch_size": batch,
                "steps": arguments.steps,
                "device": "cpu",
                "threads": arguments.threads,
                **changes.get("train", {}),
            },
            "checkpoint": changes.get("checkpoint", {}),
            "report": {"enabled": False},
        }
        if model == "smollm2":
            mapping["model"] = {"pretrained": str(smollm2())}
        else:
            mapping["model"] = steep_model(model)
            mapping["tokenizer"] = {"pretrained": str(write_tokenizer(folder / "tokenizer", vocabulary))}
        planned = plan(mapping)
        measured = steep_train(mapping, folder).peak_bytes - empty
        lines = [line["memory_bytes"] - empty for line in train_lines(folder / "memory")]
    ratio = planned.peak_bytes / measured
    figures = [planned.peak_bytes, measured]
    return [
        name,
        *(f"{value / 1e6:,.0f}" for value in figures),
        f"{ratio:.2f}",
        f"{lines[0] / 1e6:,.0f}",
        f"{lines[-1] / 1e6:,.0f}",
        ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in planned.memory.items()),
    ], ratio - 1


if __name__ == "__main__":
    main()
