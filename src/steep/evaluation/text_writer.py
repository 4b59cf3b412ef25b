"""What lets a base model write documents. In: a base model's reference and settings. Out: a function from seeds to documents.

Every token is drawn from the whole distribution at temperature 1, without top-k, top-p or penalties, so a document is a sample of
the model's own distribution: training on anything narrower would reinforce its favourite phrases. Rows that have ended leave the
batch. Weakness: small models at temperature 1 lose the thread, and no document is longer than `max_tokens`.
A change that draws other ids raises `SAMPLING_VERSION` in data/self_generated.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch

from steep.core.errors import ConfigError
from steep.data.self_generated import BATCH_DOCUMENTS, BaseModel, DrawDocuments
from steep.evaluation.generate import end_of_text_ids
from steep.models.layers import compute_device, evaluating
from steep.models.load import load_model
from steep.runtime.device import choose_device
from steep.runtime.precision import choose_precision, frozen_dtype

LEAST_KEPT_RATIO = 0.5
"""A document that reached its greatest length is cut after its last whole sentence, if at least this part of it is kept."""

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n")


def open_writer(base: BaseModel) -> DrawDocuments:
    """Load the base model; the result draws a batch of documents from it.

    Raises what loading the model raises, and ConfigError for a tokenizer without a token to begin a document with.
    """
    device = choose_device(base.device)
    dtype = frozen_dtype(choose_precision(base.precision, device.type))
    model = load_model(base.config, dtype=dtype, device=device, seed=base.seed)
    ends = end_of_text_ids(model, base.tokenizer.eos_token_id)
    start_id = next((i for i in (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id) if i is not None), None)
    if start_id is None:
        raise ConfigError(
            "data: path auto lets the base model write text, and its tokenizer has neither a BOS nor an EOS token to begin a "
            "document with. Give the path of a text instead."
        )

    def draw(seed: int) -> list[dict[str, Any]]:
        sizes = {"count": BATCH_DOCUMENTS, "max_tokens": base.max_tokens, "vocab_size": len(base.tokenizer)}
        drawn = []
        for ids in sample_documents(model, start_id, ends, **sizes, seed=seed):
            text = base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            ended = ids[-1] in ends
            drawn.append({"text": text if ended else _whole_sentences(text), "tokens": len(ids), "ended": ended})
        return drawn

    return draw


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


def _whole_sentences(text: str) -> str:
    """A text that was cut at any token, cut after its last whole sentence or line; unchanged where that keeps too little."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends and ends[-1] >= LEAST_KEPT_RATIO * len(text) else text
