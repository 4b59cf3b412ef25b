"""TRL's SFTTrainer on the documents of continued_pretraining.py, in a process of its own; prints its rate as JSON.

    pip install trl==1.16.0
    python benchmarks/continued_pretraining.py --trl     calls
    python benchmarks/trl_worker.py SETTINGS             with settings as JSON

Settings are TRL's fastest that lose no token on this job, in two ways. `packing` by `bfd_split`: best fit, long documents split
(its default `bfd` discards their ends); it turns padding off and gives every document positions of its own. Without packing,
documents of nearly the same length share a batch, padded to the longest. The chunked loss, its default.
No activation checkpointing, which is on by default and costs 20 % by its own text. The fused AdamW. Batches of the same size as
steep's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import CountingCollator, linear_adapter, real_tokens_per_second, step_clock


def main(settings: dict[str, Any]) -> None:
    """Train and print {"tokens_per_second", "padding_ratio", "documents_apart"}.

    settings: way (lora or full), folder, steps, skip, window, packing, sequences, rank, rate, bf16, device.
    """
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder, lora, bf16 = Path(settings["folder"]), settings["way"] == "lora", settings["bf16"]
    torch.set_num_threads(os.cpu_count() or 1)
    frozen = torch.bfloat16 if bf16 and lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=frozen)
    apart = documents_apart(model)
    clock = step_clock()
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output, **batches(settings["packing"]), max_length=settings["window"], shuffle_dataset=True,
            per_device_train_batch_size=settings["sequences"], max_steps=settings["steps"],
            gradient_checkpointing=False, learning_rate=settings["rate"], weight_decay=0.0,
            lr_scheduler_type="constant", bf16=bf16, use_cpu=settings["device"] == "cpu", report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
            optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = SFTTrainer(
            model, config, train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[clock],
            peft_config=linear_adapter(settings["rank"]) if lora else None,
        )  # fmt: skip
        counting = CountingCollator(trainer.data_collator, lambda rows, _: sum(len(row["input_ids"]) for row in rows))
        trainer.data_collator = counting
        trainer.train()
    peak = {} if settings["device"] == "cpu" else {"peak_bytes": torch.cuda.max_memory_allocated()}
    print(json.dumps({
        **peak,
        "tokens_per_second": real_tokens_per_second(clock.ends, counting.real, settings["skip"]),
        "padding_ratio": counting.padding_ratio,
        "documents_apart": not settings["packing"] or apart,
    }))  # fmt: skip


def batches(packing: bool) -> dict[str, Any]:
    """How documents make up batches: packed, or padded beside documents of nearly the same length."""
    if packing:
        return {"packing": True, "packing_strategy": "bfd_split"}
    return {"packing": False, "train_sampling_strategy": "group_by_length"}


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
