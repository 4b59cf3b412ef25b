"""Documents that a model generates without a prompt, many at a time. In: a causal model of transformers. Out: their ids.

Every token is drawn from the whole distribution at temperature 1, without top-k, top-p or penalties, so a document is a sample of
the model's own distribution: training on anything narrower would reinforce its favourite phrases. Rows that have ended leave the
batch. Weakness: small models at temperature 1 lose the thread, and no document is longer than `max_tokens`.
A change that draws other ids raises `SAMPLING_VERSION` in data/self_generated.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from steep.models.layers import compute_device, evaluating


@torch.no_grad()
def sample_documents(
    model: Any, start_id: int, end_ids: Collection[int], *, count: int, max_tokens: int, vocab_size: int, seed: int
) -> list[list[int]]:
    """`count` documents as ids, without the `start_id` before them; the last id is in `end_ids` where the model ended it.

    model: maps input_ids (B, 1) and a key-value cache to logits (B, 1, V) and the cache, as transformers' models do.
    vocab_size: ids from here on are never drawn; some models have embedding rows that no token uses.
    seed: makes the documents repeatable on one device; other devices and precisions give others.
    """
    device = compute_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    documents: list[list[int]] = [[] for _ in range(count)]
    rows = list(range(count))
    ids_B1, cache = torch.full((count, 1), start_id, device=device), None
    with evaluating(model):
        for _ in range(max_tokens):
            output = model(input_ids=ids_B1, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            weights_BV = output.logits[:, -1, :vocab_size].float().softmax(-1)
            ids_B1 = torch.multinomial(weights_BV, 1, generator=generator)
            drawn = ids_B1[:, 0].tolist()
            for row, token in zip(rows, drawn, strict=True):
                documents[row].append(token)
            going = [index for index, token in enumerate(drawn) if token not in end_ids]
            if not going:
                break
            if len(going) < len(rows):
                kept = torch.tensor(going, device=device)
                cache.batch_select_indices(kept)
                rows, ids_B1 = [rows[index] for index in going], ids_B1[kept]
    return documents
