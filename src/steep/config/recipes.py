"""Recipes: defaults with their evidence. In: what the user wrote, with a recipe's name. Out: the same with the values filled in.

Precedence: built-in defaults < recipe < file < command line. The values are filled in before the configuration is checked, so
that the resolved configuration holds them, and a run continues unchanged when a later version's recipe differs. Weakness:
the rates are for models between 100 million and 10 billion parameters; `steep plan` prints them so that they can be judged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

REPLAY_RATIO = 0.05

COOLDOWN = "Hägele et al. 2024, arXiv:2405.18392"
REWARMING = "Ibrahim et al. 2024, arXiv:2403.08763"
GPT3 = "Brown et al. 2020, arXiv:2005.14165"
LEARNS_LESS = "Biderman et al. 2024, arXiv:2405.09673"
NO_REGRET = "LoRA Without Regret, Thinking Machines 2025"


@dataclass(frozen=True)
class RecipeDefault:
    """One value of a recipe."""

    key: str
    value: Any
    why: str
    source: str
    instead_of: tuple[str, ...] = ()
    """Keys that say the same in another way: if the user gives one of them, the recipe does not apply."""
    needs: tuple[str, Any] | None = None
    """(key, value): applies only where the key has this value; `...` means any value, None means not given."""


ADAPTED, WHOLE = ("adapter", ...), ("adapter", None)
WSD, NOT_WSD = ("schedule.name", "wsd"), ("schedule.name", "cosine")

CONTINUED_PRETRAINING = (
    RecipeDefault("schedule.name", "cosine", "re-decay after re-warming", REWARMING),
    RecipeDefault(
        "schedule.warmup_ratio", 0.01, "re-warm; its length hardly matters", REWARMING,
        instead_of=("schedule.warmup_steps",),
    ),
    RecipeDefault("schedule.final_ratio", 0.1, "cosine to a tenth", REWARMING, needs=NOT_WSD),
    RecipeDefault("schedule.decay_ratio", 0.2, "cooldown of a run of any length", COOLDOWN, needs=WSD),
    RecipeDefault("schedule.decay_shape", "one_minus_sqrt", "the best of the shapes", COOLDOWN, needs=WSD),
    RecipeDefault("schedule.final_ratio", 0.0, "the cooldown goes to zero", COOLDOWN, needs=WSD),
    RecipeDefault("optimizer.learning_rate", 2e-5, "the whole model", "steep's own: look with a sweep", needs=WHOLE),
    RecipeDefault(
        "optimizer.learning_rate", 2e-4, "adapters want ten times the rate", NO_REGRET,
        needs=ADAPTED,
    ),
    RecipeDefault("adapter.rank", 128, "small ranks fill up in continued pretraining", LEARNS_LESS, needs=ADAPTED),
    RecipeDefault("adapter.rslora", True, "high ranks learn only with it", "Kalajdzievski 2023, arXiv:2312.03732", needs=ADAPTED),
    RecipeDefault("adapter.alpha", 32.0, "scale 2.8 at rank 128", "Unsloth's continued pretraining, 2024", needs=ADAPTED),
    RecipeDefault("adapter.targets", "all-linear", "feed-forward layers matter most", NO_REGRET, needs=ADAPTED),
    RecipeDefault("data.document_mask", True, "attention inside documents", "Zhao et al. 2024, arXiv:2402.13991"),
    RecipeDefault("data.packing", "best_fit", "documents whole where they fit", "Ding et al. 2024, arXiv:2404.10830"),
    RecipeDefault("tokenizer.append_eos", True, "or the model does not learn to stop", "unslothai/unsloth issues 628 and 683"),
    RecipeDefault("train.max_grad_norm", 1.0, "clip", GPT3),
    RecipeDefault(
        "evaluate.every_ratio", 0.2, "domain and general text five times a run, with more text each time", "steep's own",
        instead_of=("evaluate.every_steps",), needs=("data.validation", ...),
    ),
)  # fmt: skip

PRETRAINING = (
    RecipeDefault("schedule.name", "cosine", "", GPT3),
    RecipeDefault("schedule.warmup_ratio", 0.01, "", GPT3, instead_of=("schedule.warmup_steps",)),
    RecipeDefault("schedule.final_ratio", 0.1, "to a tenth", GPT3, needs=NOT_WSD),
    RecipeDefault("schedule.decay_ratio", 0.2, "cooldown of a run of any length", COOLDOWN, needs=WSD),
    RecipeDefault("schedule.decay_shape", "one_minus_sqrt", "the best of the shapes", COOLDOWN, needs=WSD),
    RecipeDefault("schedule.final_ratio", 0.0, "the cooldown goes to zero", COOLDOWN, needs=WSD),
    RecipeDefault(
        "optimizer.learning_rate", 6e-4, "of 125 million parameters; 3e-4 for 350 million, 2e-4 for 1.3 billion", GPT3,
    ),
    RecipeDefault("optimizer.betas", (0.9, 0.95), "", GPT3, needs=("optimizer.name", "adamw")),
    RecipeDefault("optimizer.weight_decay", 0.1, "", GPT3),
    RecipeDefault("data.document_mask", True, "attention inside documents", "Zhao et al. 2024, arXiv:2402.13991"),
    RecipeDefault("data.packing", "best_fit", "documents whole where they fit", "Ding et al. 2024, arXiv:2404.10830"),
    RecipeDefault("tokenizer.append_eos", True, "documents end", GPT3),
    RecipeDefault("train.max_grad_norm", 1.0, "clip", GPT3),
)  # fmt: skip

RECIPES = {"continued_pretraining": CONTINUED_PRETRAINING, "pretraining": PRETRAINING}

BUILT_IN = {"schedule.name": "cosine", "optimizer.name": "adamw"}
"""Defaults used in conditions, where neither the user nor the recipe gives the key."""


def apply_recipe(data: dict[str, Any]) -> dict[str, Any]:
    """The user's mapping, its missing values filled in from its `recipe`; unchanged without a known recipe."""
    filled = copy.deepcopy(data)
    for default in RECIPES.get(str(data.get("recipe")), ()):
        name, key = default.key.split(".")
        section = {} if filled.get(name) is None else filled[name]
        is_open = isinstance(section, dict) and "_target_" not in section  # the keys of a `_target_` are its arguments
        if is_open and key not in section and _applies(default, data):  # a written null counts: the user wrote it
            filled[name] = {**section, key: default.value}
    if data.get("recipe") == "continued_pretraining":
        _share_replay(filled)
    return filled


def recipe_lines(data: dict[str, Any]) -> list[str]:
    """What the recipe of a resolved configuration set, and what the user set; one line per key."""
    name = str(data.get("recipe"))
    if name not in RECIPES:
        return []
    lines = [f"recipe {name}:"]
    for default in RECIPES[name]:
        if not _applies(default, data):
            continue
        now = _get(data, default.key)
        value = list(default.value) if isinstance(default.value, tuple) else default.value  # `data` is JSON
        if now == value:
            reason = f"{default.why}; " if default.why else ""
            lines.append(f"  {default.key} {_show(now)}: {reason}{default.source}")
        elif now is not None:
            lines.append(f"  {default.key} {_show(now)}: yours (the recipe has {_show(value)})")
    if name == "continued_pretraining":
        lines += _replay_lines(data)
    return lines


def _replay_lines(data: dict[str, Any]) -> Iterator[str]:
    sources = data.get("data", {}).get("train", [])
    replay = sum(source.get("weight") or 0 for source in sources if source.get("role") == "replay")
    total = sum(source.get("weight") or 0 for source in sources)
    if replay and total:
        yield f"  replay {replay / total:.1%} of the tokens: 5 % for the same language; Ibrahim et al. 2024, arXiv:2403.08763"
    elif not any(source.get("role") == "replay" for source in sources):
        yield (
            "  replay none: 1 to 5 % of general text stops most forgetting (arXiv:2502.06042, arXiv:2403.08763), and the recipe "
            "has no text of its own. Name some: {path: general.jsonl, role: replay}, or {path: auto, role: replay} to let the "
            "base model write it"
        )


def _share_replay(data: dict[str, Any]) -> None:
    """Give one source of new text and one of replay their weights, if they have none: 5 % of the tokens are replay."""
    sources = data.get("data", {}).get("train") if isinstance(data.get("data"), dict) else None
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return
    replay = [source for source in sources if source.get("role") == "replay"]
    if len(sources) == 2 and len(replay) == 1 and all(source.get("weight") is None for source in sources):
        for source in sources:
            source["weight"] = REPLAY_RATIO if source is replay[0] else 1 - REPLAY_RATIO


def _applies(default: RecipeDefault, data: dict[str, Any]) -> bool:
    if any(_get(data, key) is not None for key in default.instead_of):
        return False
    if default.needs is None:
        return True
    key, wanted = default.needs
    if wanted is ... or wanted is None:
        found = _get(data, key)
        given = isinstance(found, dict) if key == "adapter" else bool(found)  # `adapter: {}` asks for one
        return given == (wanted is ...)
    return (_get(data, key) or BUILT_IN.get(key)) == wanted


def _get(data: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return None
        data = data[part]
    return data


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
