"""TRL's SFTTrainer on the documents of continued_pretraining.py, in a process of its own; prints its rate as JSON.

    pip install trl==1.16.0
    python benchmarks/continued_pretraining.py --trl     calls
    python benchmarks/trl_worker.py SETTINGS             with settings as JSON

Settings are TRL's fastest that lose no token on this job. `packing` by `bfd_split`: best fit, long documents split (its default
`bfd` discards their ends); it turns padding off and gives every document positions of its own. The chunked loss, its default.
No activation checkpointing, which is on by default and costs 20 % by its own text. The fused AdamW. Batches of the same size as
steep's.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Train and print {"tokens_per_second", "padding_ratio", "documents_apart"}.

    settings: way (lora or full), folder, steps, skip, window, sequences, rank, rate, bf16, device.
    """
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *positional: Any, **named: Any) -> None:
            self.ends.append(time.time())

    class Counting:
        """A collator that notes how many of the tokens are trained on."""

        def __init__(self, collator: Any) -> None:
            self.collator, self.real, self.all = collator, [], []  # type: ignore[var-annotated]

        def __call__(self, rows: list[Any]) -> Any:
            self.real.append(sum(len(row["input_ids"]) for row in rows))
            batch = self.collator(rows)
            self.all.append(batch["input_ids"].numel())
            return batch

    folder, lora, bf16 = Path(settings["folder"]), settings["way"] == "lora", settings["bf16"]
    torch.set_num_threads(os.cpu_count() or 1)
    frozen = torch.bfloat16 if bf16 and lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=frozen)
    apart = documents_apart(model)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output, packing=True, packing_strategy="bfd_split", max_length=settings["window"], shuffle_dataset=True,
            per_device_train_batch_size=settings["sequences"], max_steps=settings["steps"],
            gradient_checkpointing=False, learning_rate=settings["rate"], weight_decay=0.0,
            lr_scheduler_type="constant", bf16=bf16, use_cpu=settings["device"] == "cpu", report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
            optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = SFTTrainer(
            model, config, train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[clock],
            peft_config=adapter(settings["rank"]) if lora else None,
        )  # fmt: skip
        trainer.data_collator = counting = Counting(trainer.data_collator)
        trainer.train()
    real = counting.real[: len(clock.ends)]
    seconds = [stop - start for start, stop in itertools.pairwise(clock.ends[settings["skip"] - 1 :])]
    peak = {} if settings["device"] == "cpu" else {"peak_bytes": torch.cuda.max_memory_allocated()}
    print(json.dumps({
        **peak,
        "tokens_per_second": sum(real[settings["skip"] :]) / sum(seconds),
        "padding_ratio": 1 - sum(counting.real) / sum(counting.all),
        "documents_apart": apart,
    }))  # fmt: skip


def adapter(rank: int) -> Any:
    """The adapter that steep's run has."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def documents_apart(model: Any) -> bool:
    """Whether a changed first document leaves the second's logits as they were, when only positions tell them apart."""
    import torch

    ids = torch.arange(32)[None] + 100
    other = ids.clone()
    other[0, :16] += 500
    positions = torch.arange(16).repeat(2)[None]
    with torch.no_grad():
        one, two = (model(input_ids=each, position_ids=positions, use_cache=False).logits for each in (ids, other))
    return bool(torch.allclose(one[0, 16:], two[0, 16:], atol=1e-3))


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    else:
        main(json.loads(sys.argv[1]))
