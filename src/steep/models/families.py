"""The model families that people use: how a hub id is recognized, how large it is, and which settings suit that size.

In: a hub id, folder or short name. Out: facts and settings, as data. No network. The rates are steep's own for whole models,
and ten times those for adapters ("LoRA Without Regret", Thinking Machines 2025); `steep lr-find` measures the right one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from steep.core.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """A family: its name, the model that the name alone stands for, the ids that belong to it, and what to know about it."""

    name: str
    example: str
    pattern: str
    note: str = ""
    context_tokens: int = 2048
    """Positions of its smallest member."""


GATED = "accept its licence on the hub first, then run: hf auth login"

FAMILIES = (
    Family("smollm2", "HuggingFaceTB/SmolLM2-135M", r"smollm-?2"),
    Family("smollm3", "HuggingFaceTB/SmolLM3-3B-Base", r"smollm-?3"),
    Family("llama3", "meta-llama/Llama-3.2-1B", r"llama-?3", GATED),
    Family("qwen2.5", "Qwen/Qwen2.5-0.5B", r"qwen-?2\.?5"),
    Family("qwen3", "Qwen/Qwen3-0.6B-Base", r"qwen-?3", "ids without -Base are tuned for chat"),
    Family("gemma2", "google/gemma-2-2b", r"gemma-?2", GATED),
    Family("gemma3", "google/gemma-3-270m", r"gemma-?3", f"{GATED}; ids with -it are tuned for chat"),
    Family("mistral", "mistralai/Mistral-7B-v0.3", r"mistral|ministral"),
    Family("phi", "microsoft/phi-2", r"phi-?\d", "Phi-3 and later come tuned for chat only"),
    Family("gpt2", "openai-community/gpt2", r"gpt-?2", "its context is 1,024 tokens", context_tokens=1024),
    Family("olmo", "allenai/OLMo-2-0425-1B", r"olmo"),
)  # fmt: skip

SIZES_WITHOUT_A_NUMBER = {
    "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.5e9, "gpt2": 124e6, "phi-1_5": 1.3e9, "phi-1": 1.3e9, "phi-2": 2.7e9,
    "phi-3-mini": 3.8e9, "phi-3.5-mini": 3.8e9, "phi-3-small": 7.4e9, "phi-3-medium": 14e9, "phi-4-mini": 3.8e9, "phi-4": 14.7e9,
    "mistral-nemo": 12.2e9,
}  # fmt: skip
"""Parameters of models whose ids do not say them, by the beginning of their names."""


@dataclass(frozen=True)
class Settings:
    """What a run of this size starts from."""

    learning_rate: float
    sequence_length: int
    global_batch_size: int
    adapter: bool = False
    quantize: Optional[str] = None
    checkpointing: bool = False


CLASSES = (
    (0.7e9, Settings(5e-5, 1024, 64)),
    (2.5e9, Settings(2e-5, 2048, 64, checkpointing=True)),
    (13e9, Settings(2e-4, 2048, 64, adapter=True, checkpointing=True)),
    (float("inf"), Settings(1e-4, 2048, 64, adapter=True, quantize="nf4", checkpointing=True)),
)
"""(up to this many parameters, settings)."""


def family_of(model: str) -> Optional[Family]:
    """The family that a hub id, folder or short name belongs to, by the last part of it; None if it is none of these."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    return next((family for family in FAMILIES if re.search(family.pattern, name)), None)


def known_model(model: str) -> tuple[str, Family]:
    """The hub id that a name stands for (`smollm2`: its smallest model), and its family. Raises ConfigError with those known."""
    family = family_of(model)
    if family is None:
        known = "\n".join(f"  {family.name:<8} {family.example}" for family in FAMILIES)
        raise ConfigError(
            f"there are no ready settings for {model!r}. These families have them; give the name of one, or the id of any of its "
            f"models:\n{known}\n  For any other model: steep init TEXT --model {model}"
        )
    bare = "/" not in model and re.sub(r"[-_ ]", "", model.lower()) in (family.name, "llama", "qwen", "gemma", "phi")
    return (family.example if bare else model), family


def parameters_of(model: str) -> Optional[float]:
    """The number of parameters that a model's name says (`135M`, `1.7B`), or that is known; None if neither."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name)
    if sizes:
        number, unit = sizes[0]
        return float(number) * (1e9 if unit == "b" else 1e6)
    known = [key for key in SIZES_WITHOUT_A_NUMBER if name.startswith(key)]
    return SIZES_WITHOUT_A_NUMBER[max(known, key=len)] if known else None


def settings_for(parameters: Optional[float]) -> Settings:
    """The settings of the size class; of the smallest if the size is not known."""
    return next(settings for most, settings in CLASSES if (parameters or 0) <= most)
