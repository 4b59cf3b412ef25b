"""Scores against transformers' own loss, one document at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steep.core.errors import DataError
from steep.core.say import tell
from steep.data.held_out_text import HeldOutText
from steep.evaluation.held_out import first_documents, score_text
from steep.models.attention_choice import prepare_lm_loss
from steep.models.config import ModelConfig
from steep.models.load import load_model
from support import LLAMA


class Documents:
    """Token documents in memory, as a store."""

    def __init__(self, documents: list[list[int]], text_bytes: list[int] | None):
        self.documents = documents
        self.document_lengths = np.array([len(d) for d in documents], dtype=np.int64)
        self.text_bytes = None if text_bytes is None else np.array(text_bytes, dtype=np.int64)

    def read(self, document: int, start: int, count: int, out: np.ndarray) -> None:
        out[:] = self.documents[document][start : start + count]


@pytest.fixture(scope="module")
def scored() -> tuple:
    model = load_model(ModelConfig(config=LLAMA), seed=3).eval()
    generator = np.random.default_rng(1)
    documents = [[*generator.integers(1, 512, size=n).tolist(), 0] for n in (3, 20, 47, 11, 30)]
    text = HeldOutText("t", [(Documents(documents, [7, 61, 150, 40, 90]), np.arange(5))])
    return model, documents, text


def score(model: torch.nn.Module, text: HeldOutText, **changes):
    lm_loss = prepare_lm_loss(model, tell)
    settings = {"tokens": 10_000, "batch_size": 2, "sequence_length": 64, "eos_id": 0, **changes}
    return score_text(lm_loss.token_losses, text, **settings)


def test_score_equals_transformers_loss_document_by_document(scored: tuple) -> None:
    model, documents, text = scored
    # Windows of 64 tokens are cut from the documents laid end to end; a document that is cut is scored in two windows, so
    # the reference takes a length that holds all of them: then every document is whole.
    found = score(model, text, sequence_length=128)
    model.set_attn_implementation("eager")
    nats, text_nats, count = 0.0, 0.0, 0
    for document in documents:
        ids = torch.tensor([document])
        logits = model(input_ids=ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        nats, text_nats = nats + losses.sum().item(), text_nats + losses[:-1].sum().item()
        count += len(losses)
    assert found.nats_per_token == pytest.approx(nats / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(text_nats / math.log(2) / 348, rel=1e-6)
    assert (found.tokens, found.documents, found.text_bytes) == (count, 5, 348)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_score_does_not_depend_on_the_batch_size(scored: tuple, batch_size: int) -> None:
    model, _, text = scored
    assert score(model, text, batch_size=batch_size).nats_per_token == pytest.approx(
        score(model, text, batch_size=2).nats_per_token, rel=1e-7
    )


def test_whole_documents_are_taken_up_to_the_token_limit(scored: tuple) -> None:
    _, _, text = scored
    chosen = {limit: [part.tolist() for part in first_documents(text, limit)] for limit in (25, 24, 1)}
    assert chosen[25] == [[0, 1]]  # 4 + 21 tokens
    assert chosen[24] == [[0, 3]]  # 21 and 48 do not fit after 4, 12 does
    assert chosen[1] == [[0]]  # never none: the shortest


def test_bytes_are_counted_by_decoding_where_the_store_does_not_know_them(scored: tuple) -> None:
    model, documents, _ = scored
    text = HeldOutText("t", [(Documents(documents, None), np.arange(5))])
    assert score(model, text).bits_per_byte is None
    assert score(model, text, decode=lambda ids: "é" * len(ids)).text_bytes == 2 * sum(map(len, documents))


def test_a_text_without_anything_to_predict_is_refused(scored: tuple) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        score(scored[0], HeldOutText("t", [(Documents([[5]], [1]), np.arange(1))]))
