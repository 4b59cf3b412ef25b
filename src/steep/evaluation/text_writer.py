"""What lets a base model write documents. In: a base model's reference and settings. Out: a function from seeds to documents."""

from __future__ import annotations

import re
from typing import Any

from steep.core.errors import ConfigError
from steep.data.self_generated import BATCH_DOCUMENTS, BaseModel, DrawDocuments
from steep.evaluation.generate import end_of_text_ids
from steep.evaluation.sample import sample_documents
from steep.models.load import load_model
from steep.runtime.device import choose_device, choose_precision, frozen_dtype

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
    start_id = _start_id(base.tokenizer)

    def draw(seed: int) -> list[dict[str, Any]]:
        sampled = sample_documents(
            model,
            start_id,
            ends,
            count=BATCH_DOCUMENTS,
            max_tokens=base.max_tokens,
            vocab_size=len(base.tokenizer),
            seed=seed,
        )
        return [_document(base.tokenizer, ids, ids[-1] in ends) for ids in sampled]

    return draw


def _start_id(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        "data: path auto lets the base model write text, and its tokenizer has neither a BOS nor an EOS token to begin a "
        "document with. Give the path of a text instead."
    )


def _document(tokenizer: Any, ids: list[int], ended: bool) -> dict[str, Any]:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"text": text if ended else _whole_sentences(text), "tokens": len(ids), "ended": ended}


def _whole_sentences(text: str) -> str:
    """A text that was cut at any token, cut after its last whole sentence or line; unchanged where that keeps too little."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends and ends[-1] >= LEAST_KEPT_RATIO * len(text) else text
