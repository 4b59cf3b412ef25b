"""Two runs of `steep train` on one GPU: tokens/s, MFU, peak memory.

    python benchmarks/gpu.py [--models gpt2-124m llama-1.2b] [--steps 60] [--skip 20]

gpt2-124m: 32 x 1,024 tokens a step (the guide: 66,000-73,000 tokens/s, 38.6 GiB on one of its GPUs; wanted: 200,000).
llama-1.2b: Llama of 1.24 B parameters, 4,096 tokens (the guide: 10,160 tokens/s; wanted: 30,000).
bf16 autocast over fp32 weights, fused AdamW, layers compiled, document attention with documents of a whole sequence, random
ids: the whole loop, metrics and reading included. Memory is torch's own peak of allocated bytes, as in the training lines.
With --eager nothing is compiled.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from common import (
    GPT2_TARGET,
    gpu_heading,
    heading,
    spread,
    steep_train,
    table,
    train_lines,
    write_store,
    write_tokenizer,
)

LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "gpt2-124m": {
        "model": {"_target_": GPT2_TARGET, "vocab_size": 50257},
        "vocabulary": 50257,
        "batch": 32,
        "tokens": 1024,
    },
    "llama-1.2b": {"model": {"config": LLAMA_1B}, "vocabulary": 128256, "batch": 4, "tokens": 4096},
}


def main() -> None:
    """Measure and print a Markdown section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", type=int, default=20, help="steps left out at the start: compiling, warming up")
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    print(f"{heading()}\n{gpu_heading()}, compiled: {not arguments.eager}\n", flush=True)
    rows = [measure(name, arguments.steps, arguments.skip, not arguments.eager) for name in arguments.models]
    print(table(["model", "batch", "tokens/s: median (min-max)", "MFU", "peak allocated GiB"], rows))


def measure(name: str, steps: int, skip: int, compiled: bool) -> list[str]:
    """One run's row."""
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokenizer(folder / "tokenizer", run["vocabulary"])
        write_store(folder / "store", run["vocabulary"], run["tokens"], (steps + 1) * run["batch"])
        mapping = {
            "run": {"name": name, "directory": temporary},
            "model": run["model"],
            "tokenizer": {"pretrained": str(folder / "tokenizer")},
            "data": {"sequence_length": run["tokens"], "train": [{"path": str(folder / "store.bin")}]},
            "train": {
                "global_batch_size": run["batch"], "steps": steps, "device": "cuda", "precision": "mixed_bf16",
                "compile": compiled, "loss_chunk_bytes": "512MiB",
            },
            "checkpoint": {"asynchronous": False},
            "report": {"enabled": False},
        }  # fmt: skip
        steep_train(mapping, folder)
        lines = train_lines(folder / name)[skip:]
    # steps are read one late on a GPU, so a single step's time says little: groups of ten steps do
    ends = [line["time"] for line in lines][::10]
    step_tokens = run["batch"] * run["tokens"]
    rates = [10 * step_tokens / (stop - start) for start, stop in itertools.pairwise(ends)]
    flops = [line["mfu"] for line in lines if line["mfu"] is not None]
    return [
        name,
        f"{run['batch']} x {run['tokens']:,}",
        spread(rates),
        spread(flops, ".1%") if flops else "peak of this GPU unknown",
        f"{max(line['memory_bytes'] for line in lines) / 2**30:.1f}",
    ]


if __name__ == "__main__":
    main()
