"""The guide's Mistral-7B run on one GPU: the peak memory that `steep plan` predicts against what training takes.

    python benchmarks/guide_memory.py [--steps 4] [--folder FOLDER]

Mistral-7B-v0.3's shape with random weights (14.5 GB, written into the folder first; the memory and the time do not depend on
their values), 4-bit, rank 128 on all linear layers, embeddings and head in full, 8-bit AdamW, 8 micro-batches of 2 x 2,048
tokens, activations checkpointed and held in host memory, bf16. The guide's own run reserved 9.332 GiB with 2 short stories in a
micro-batch; here every micro-batch is full. Reserved is what nvidia-smi sees of torch, allocated what is in use.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import gpu_heading, heading, last_json, run_process, table, train_lines, write_store, write_tokenizer

SHAPE = {
    "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": None,
    "tie_word_embeddings": False,
}  # fmt: skip
GUIDE_GIB = 9.332
TOKENS, SEQUENCES = 2048, 16


def main() -> None:
    """Measure and print a Markdown section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", help="where the weights go; default a temporary folder")
    parser.add_argument("--work", choices=["write", "train"], help=argparse.SUPPRESS)  # the processes' own calls
    arguments = parser.parse_args()
    if arguments.work is not None:
        {"write": write_model, "train": train}[arguments.work](Path(arguments.folder))
        return
    print(f"{heading()}\n{gpu_heading()}\n", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        print(measure(Path(made), arguments.steps))


def measure(folder: Path, steps: int) -> str:
    """A table of predicted and measured."""
    import steep

    itself = [sys.executable, __file__, "--folder", str(folder), "--work"]
    run_process([*itself, "write"])
    mapping = run_mapping(folder, steps)
    (folder / "run.json").write_text(json.dumps(mapping), encoding="utf-8")
    write_store(folder / "store", SHAPE["vocab_size"], TOKENS, (steps + 1) * SEQUENCES)  # type: ignore[arg-type]
    planned = steep.plan(mapping, device="cuda").peak_bytes / 2**30
    peak = last_json(run_process([*itself, "train"]).output)
    ends = [line["time"] for line in train_lines(folder / "guide")]
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    rows = [
        ["the guide's run, reserved", f"{GUIDE_GIB:.2f}", ""],
        ["predicted by steep plan", f"{planned:.2f}", ""],
        ["steep, reserved", f"{peak['reserved'] / 2**30:.2f}", f"{planned / (peak['reserved'] / 2**30):.2f}"],
        ["steep, allocated", f"{peak['allocated'] / 2**30:.2f}", f"{planned / (peak['allocated'] / 2**30):.2f}"],
    ]
    rate = f"{SEQUENCES * TOKENS / seconds:,.0f} tokens/s over {len(ends) - 1} steps"
    return table(["peak", "GiB", "predicted / this"], rows) + f"\n\n{rate}"


def run_mapping(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": "guide", "directory": str(folder)},
        "model": {"pretrained": str(folder / "model"), "quantize": "nf4"},
        "adapter": {"rank": 128, "alpha": 32, "rslora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
        "data": {"sequence_length": TOKENS, "train": [{"path": str(folder / "store.bin")}]},
        "optimizer": {"name": "adamw_8bit", "learning_rate": 5e-5},
        "train": {
            "global_batch_size": SEQUENCES, "micro_batch_size": 2, "steps": steps, "device": "cuda",
            "precision": "mixed_bf16", "activation_checkpointing": {"mode": "full", "offload": True},
        },
        "report": {"enabled": False},
    }  # fmt: skip


# ---- processes of their own ----


def write_model(folder: Path) -> None:
    """The shape with random weights as transformers would save it, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPE)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model", max_shard_size="4GB")
    write_tokenizer(folder / "model", SHAPE["vocab_size"])  # type: ignore[arg-type]


def train(folder: Path) -> None:
    """The run; prints torch's peaks."""
    import torch

    import steep

    steep.train(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    print(json.dumps({"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}))


if __name__ == "__main__":
    main()
