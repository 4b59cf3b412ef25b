"""Loss of every step of `steep train` against transformers' model with torch's AdamW: same weights, same batches, fp32.

    python benchmarks/loss_parity.py [--steps 50] [--models gpt2 llama] [--document-tokens 200]

The reference knows nothing of steep's forward pass, loss or engine: whole logits of transformers' model on each document by
itself, F.cross_entropy, clip_grad_norm_, torch.optim.AdamW. The models are small (2 layers, d 128, V 2,048), so that 50 steps
of both take a minute; documents are shorter and longer than a sequence. Prints the largest relative difference, which must be
at most 1e-5, and exits with 1 if it is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import NO_DROPOUT, heading, steep_train, table, train_lines, write_store, write_tokenizer

LIMIT = 1e-5
VOCABULARY, BATCH, TOKENS = 2048, 4, 128
RATE, BETAS, DECAY = 1e-3, (0.9, 0.95), 0.1
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}  # the families' own belong to larger vocabularies
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": TOKENS, **NO_DROPOUT, **NO_SPECIAL},
    "llama": {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 352,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TOKENS, **NO_SPECIAL,
    },
}  # fmt: skip


def main() -> None:
    """Measure, print a Markdown section, exit with 1 if a difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--document-tokens", type=int, default=200)
    arguments = parser.parse_args()
    print(heading() + "\n", flush=True)
    rows, worst = [], 0.0
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = both(model, arguments.steps, arguments.document_tokens, Path(folder))
        differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
        worst = max(worst, *differences)
        at = differences.index(max(differences))
        rows.append([model, str(len(ours)), f"{ours[0]:.6f} -> {ours[-1]:.6f}", f"{max(differences):.1e} (step {at})"])
    print(table(["model", "steps", "loss", "largest relative difference"], rows))
    sys.exit(worst > LIMIT)


def both(model: str, steps: int, document_tokens: int, folder: Path) -> tuple[list[float], list[float]]:
    """Losses of steep and of the reference, one per step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from steep.models.hf_config import quiet_transformers

    torch.manual_seed(0)
    sizes = {key: value for key, value in MODELS[model].items() if key != "model_type"}
    config = AutoConfig.for_model(MODELS[model]["model_type"], vocab_size=VOCABULARY, **sizes)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "weights")
    write_tokenizer(folder / "tokenizer", VOCABULARY)
    write_store(folder / "store", VOCABULARY, document_tokens, 2 + steps * BATCH * TOKENS // document_tokens)
    mapping = {
        "run": {"name": "parity", "directory": str(folder), "seed": 7},
        "model": {"pretrained": str(folder / "weights")},
        "tokenizer": {"pretrained": str(folder / "tokenizer")},
        "data": {"sequence_length": TOKENS, "train": [{"path": str(folder / "store.bin")}]},
        "train": {"global_batch_size": BATCH, "steps": steps, "precision": "fp32", "device": "cpu"},
        "optimizer": {"learning_rate": RATE, "betas": list(BETAS), "weight_decay": DECAY},
        "report": {"enabled": False},
    }
    steep_train(mapping, folder)
    with quiet_transformers():
        return [line["loss"] for line in train_lines(folder / "parity")], list(reference_losses(mapping))


def reference_losses(mapping: dict[str, Any]) -> Iterator[float]:
    """The same run with transformers and torch alone; steep gives only which tokens come when, and the schedule."""
    import torch
    from transformers import AutoModelForCausalLM

    from steep.config.load import load_run_config
    from steep.core.say import tell
    from steep.data.open import open_run_data
    from steep.optim.schedule import multiplier
    from steep.tokenizer.open import load_tokenizer

    config = load_run_config(mapping=mapping)
    data = open_run_data(config, load_tokenizer(config.tokenizer, config.model), tell)
    steps = mapping["train"]["steps"]
    model = AutoModelForCausalLM.from_pretrained(mapping["model"]["pretrained"], dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, foreach=False, fused=False)
    for step in range(steps):
        total, count = torch.zeros(()), 0
        for planned in (data.order.sequence(index) for index in range(BATCH * step, BATCH * (step + 1))):
            for part in planned.ranges:
                document = torch.from_numpy(data.stores[planned.source].document(part.document).astype("int64"))
                ids = document[part.start : part.start + part.count]
                labels = document[part.start + 1 : part.start + part.count + 1]
                logits = model(input_ids=ids[None]).logits[0, : len(labels)]
                total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                count += len(labels)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * multiplier(step, steps, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        yield (total / count).item()


if __name__ == "__main__":
    main()
