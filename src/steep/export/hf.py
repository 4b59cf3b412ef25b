"""Export for transformers (and what reads its folders, such as vLLM): safetensors, config, tokenizer, generation_config, card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.core.files import write_text
from steep.evaluate.generate import end_of_text_ids

if TYPE_CHECKING:
    from steep.evaluate.subject import Subject


def write(subject: Subject, model: Any, folder: Path, max_shard_size: int | str, card: str) -> None:
    """Write `model`, which is the subject's in the dtype of the export, into `folder`."""
    from steep.models.load import quiet_transformers

    eos_ids = sorted(end_of_text_ids(model, subject.tokenizer.eos_id))
    generation = copy.deepcopy(model.generation_config)
    if eos_ids:
        generation.eos_token_id = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    generation.use_cache = True
    model.generation_config = generation
    model.config.use_cache = True  # off in training, but whoever serves the model wants it
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    subject.hf_tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)
