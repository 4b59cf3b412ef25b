"""Scores against transformers' own loss, one document at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steep.core.errors import DataError
from steep.core.say import tell
from steep.data.held_out_text import HeldOutText
from steep.evaluation.held_out import choose_beginnings, score_text
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


def taken(text: HeldOutText, limit: int) -> list[tuple[int, int]]:
    return [pair for part in choose_beginnings(text, limit) for pair in zip(*map(np.ndarray.tolist, part), strict=True)]


def test_documents_are_taken_up_to_the_token_limit_and_long_ones_in_part(scored: tuple) -> None:
    _, _, text = scored
    assert taken(text, 25) == [(0, 4), (1, 21)]
    assert taken(text, 24) == [(0, 4), (3, 12)]  # 21 and 48 do not fit after 4, 12 does
    assert taken(text, 3) == [(0, 3)]  # nothing fits whole
    assert taken(text, 10) == [(0, 4), (1, 6)]  # less than half of the limit would be used
    long = HeldOutText("t", [(Documents([[1] * 3_000] * 4, None), np.arange(4))])
    assert taken(long, 2_100) == [(0, 525), (1, 525), (2, 525), (3, 525)]
    assert taken(long, 300) == [(0, 150), (2, 150)]  # at least 128 tokens of each, spread over the text


def test_the_limit_holds_inside_one_document_and_progress_counts_its_tokens(scored: tuple) -> None:
    model, documents, _ = scored
    one = HeldOutText("t", [(Documents([documents[2] * 3], [900]), np.arange(1))])
    advanced: list[int] = []
    found = score(
        model,
        one,
        tokens=100,
        sequence_length=32,
        batch_size=3,
        advance=advanced.append,
        decode=lambda ids: "a" * len(ids),
    )
    assert sum(advanced) == 100  # padding left out
    assert (found.tokens, found.text_bytes) == (99, 100)
    assert len(found.part_nats) == 3  # blocks of 32 tokens or more
    assert sum(found.part_nats) / 100 / math.log(2) == pytest.approx(found.bits_per_byte)


def test_parts_hold_the_nats_of_the_text_whatever_the_batches(scored: tuple) -> None:
    model, documents, _ = scored
    many = HeldOutText("t", [(Documents(documents * 8, [100] * 40), np.arange(40))])
    one, other = score(model, many, batch_size=1), score(model, many, batch_size=7, sequence_length=64)
    assert len(one.part_nats) == 40
    assert sum(one.part_nats) == pytest.approx(one.bits_per_byte * 4_000 * math.log(2))
    assert one.part_nats == pytest.approx(other.part_nats, rel=1e-5)
    alone = HeldOutText("t", [(Documents(documents, [100] * 5), np.array([3]))])
    assert one.part_nats[3] == pytest.approx(sum(score(model, alone).part_nats), rel=0.3)  # cut elsewhere


def test_bytes_are_counted_by_decoding_where_the_store_does_not_know_them(scored: tuple) -> None:
    model, documents, _ = scored
    text = HeldOutText("t", [(Documents(documents, None), np.arange(5))])
    assert score(model, text).bits_per_byte is None
    assert score(model, text, decode=lambda ids: "é" * len(ids)).text_bytes == 2 * sum(map(len, documents))


def test_a_text_without_anything_to_predict_is_refused(scored: tuple) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        score(scored[0], HeldOutText("t", [(Documents([[5]], [1]), np.arange(1))]))
