"""Embeddings of new tokens. In: a model, and for each new id the old ids it is made of. Out: the model with rows for them.

Source: initialisation by a mean keeps new rows inside the convex hull of the old ones, which is what matters (arXiv:2407.05841).
Main choice: rows of the model that belong to no token (a padded vocabulary) are used before it is made larger, and tied weights
stay tied. Weakness: the mean of a word's parts knows neither their order nor how often they occur together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from steep.core.errors import ConfigError, ModelError
from steep.core.say import Say
from steep.models.config import AdapterConfig
from steep.models.layers import input_layer, output_layer


def extend_embeddings(model: Any, subtokens: Mapping[int, Sequence[int]], rows: int, initialise: str, say: Say) -> None:
    """Give each new id its row in embedding and output head, in place.

    rows: those that the tokenizer needs. initialise: `mean_of_subtokens`, or `mean` of all old tokens. Means are taken in fp32.
    Raises ModelError for a model whose embeddings cannot be resized.
    """
    if not hasattr(model, "resize_token_embeddings"):
        raise ModelError(
            f"vocabulary: {type(model).__name__} cannot be given more tokens; it is not a transformers model"
        )
    before = input_layer(model).weight.shape[0]
    old_rows = min([before, *subtokens])
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    tables = _tables(model)
    with torch.no_grad():
        for table in tables:
            old = table[:old_rows].float()
            whole = old.mean(dim=0) if initialise == "mean" else None
            for number, parts in subtokens.items():
                table[number] = (old[list(parts)].mean(dim=0) if whole is None else whole).to(table.dtype)
    what = {"mean_of_subtokens": "the mean of what it was split into", "mean": "the mean of all tokens"}[initialise]
    room = f"{before:,} to {rows:,} rows" if rows > before else f"in unused rows of the {before:,}"
    tied = "" if len(tables) > 1 else ", embedding and output head as one tensor"
    say(f"vocabulary: {len(subtokens):,} new tokens, {room}{tied}; each begins as {what}")


def _tables(model: Any) -> list[torch.Tensor]:
    """The weights (and the head's bias) that have a row per token, each once."""
    embedding, head = input_layer(model), output_layer(model)
    tables = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    return tables


def require_trained(model: Any) -> None:
    """Raise ConfigError where a table that holds the new rows is frozen: they would stay the means they begin as."""
    tables, named = _tables(model), model.named_parameters()
    frozen = [name for name, p in named if not p.requires_grad and any(p is table for table in tables)]
    if frozen:
        raise ConfigError(
            f"model.freeze freezes {', '.join(frozen)}, and the rows of new tokens must be trained; remove it from the "
            "patterns, or remove vocabulary"
        )


def with_embeddings(adapter: AdapterConfig, model: nn.Module, say: Say) -> AdapterConfig:
    """The adapter that also trains embedding and output head in full, which new tokens need."""
    ends = [input_layer(model), output_layer(model)]
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is end for end in ends)]
    missing = [name for name in dict.fromkeys(names) if name not in adapter.modules_to_save]
    if not missing:
        return adapter
    say(f"vocabulary: {', '.join(missing)} trained in full beside the adapter (modules_to_save), for the new tokens")
    return adapter.model_copy(update={"modules_to_save": [*adapter.modules_to_save, *missing]})
