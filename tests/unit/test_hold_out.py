"""What is held out of a run's sources: the share in tokens on any corpus, never trained on, the same however the run changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steep.batch import IGNORE_INDEX
from steep.config.load import as_config
from steep.config.settled import as_saved, keep_settled
from steep.core.errors import ConfigError
from steep.data.hold_out import HoldOut
from steep.data.open import RunData, open_run_data
from steep.loader import Loader
from steep.order.batches import run_sizes
from steep.store.cut_store import UNKNOWN_BYTES, CutStore
from steep.store.reader import TokenStore
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.open import text_tokenizer
from support import run_mapping

RNG = np.random.default_rng(0)


def hashes(number: int) -> np.ndarray:
    return RNG.integers(0, 2**64, size=number, dtype=np.uint64)


@pytest.mark.parametrize(
    "lengths",
    [[200_000], [300], [20_000] * 6, [1_650] * 61, [1_000] * 300, [100] * 10_000 + [5_000_000] * 3, [3_000, 40_000, 9]],
    ids=["one", "one small", "six", "61", "300", "three giants", "unequal"],
)
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_share_is_met_in_tokens_and_nothing_is_lost(lengths: list[int], share: float) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    found = HoldOut(share).take(hashes(len(tokens)), tokens)
    held = tokens[found.documents].sum() + found.blocks[:, 2].sum()
    assert held == pytest.approx(share * tokens.sum(), rel=0.1)
    for document in np.unique(
        found.blocks[:, 0]
    ):  # blocks and rests together are the document, in order, without overlap
        assert document not in found.documents
        parts = [part for table in (found.blocks, found.rests) for part in table.tolist() if part[0] == document]
        ends = [start + count for _, start, count in sorted(parts)]
        assert [start for _, start, _ in sorted(parts)] == [0, *ends[:-1]]
        assert ends[-1] == tokens[document]


def test_short_documents_are_held_out_whole_and_long_ones_give_blocks() -> None:
    assert not len(HoldOut(0.05).take(hashes(300), np.full(300, 1_000)).blocks)
    giants = HoldOut(0.05).take(hashes(10_003), np.array([100] * 10_000 + [5_000_000] * 3))
    assert len(giants.documents) == 500
    assert set(giants.blocks[:, 0].tolist()) == {10_000, 10_001, 10_002}
    assert len(HoldOut(0.05).take(hashes(1), np.array([200_000])).blocks) == 16


def test_the_choice_follows_the_content_and_not_the_order() -> None:
    values, lengths = hashes(500), RNG.integers(10, 3_000, size=500)
    shuffled = RNG.permutation(500)

    def chosen(order: np.ndarray) -> tuple[set[int], set[tuple[int, int, int]]]:
        found = HoldOut(0.1).take(values[order], lengths[order])
        blocks = {(int(values[order][d]), start, count) for d, start, count in found.blocks.tolist()}
        return set(values[order][found.documents].tolist()), blocks

    assert chosen(np.arange(500)) == chosen(shuffled)
    more, more_lengths = (
        np.concatenate([values, hashes(50)]),
        np.concatenate([lengths, RNG.integers(10, 3_000, size=50)]),
    )
    then, now = chosen(np.arange(500))[0], HoldOut(0.1).take(more, more_lengths)
    assert len(then - set(more[now.documents].tolist())) <= 0.2 * len(then)  # those near the edge


def test_copies_are_treated_alike_also_in_another_source() -> None:
    one = np.array([1, 1, 2, 3], dtype=np.uint64) << np.uint64(60)
    lengths = np.array([5_000, 5_000, 5_000, 90])
    holder = HoldOut(0.1)
    first = holder.take(one, lengths)
    spans = {document: [(s, c) for d, s, c in first.blocks.tolist() if d == document] for document in (0, 1)}
    assert spans[0] == spans[1] != []
    other = np.concatenate([hashes(2_000), one])
    second = holder.take(other, np.concatenate([np.full(2_000, 4_000), lengths]))
    for document in range(4):  # held out and trained on in the second source as in the first
        there = [(s, c) for d, s, c in second.blocks.tolist() if d == 2_000 + document]
        assert there == [(s, c) for d, s, c in first.blocks.tolist() if d == document]
        assert (2_000 + document in second.documents) == (document in first.documents)
    assert np.array_equal(HoldOut(0.1).take(one, lengths).blocks, first.blocks)  # whatever comes later


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> TextTokenizer:
    config = as_config(run_mapping(Path("."), Path("."), tiny_tokenizer_directory))
    reference = str(tiny_tokenizer_directory)
    return text_tokenizer(load_hf_tokenizer(reference), config.tokenizer, reference)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """`book.txt`, one document, and `notes/` of six."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "book.txt").write_text("\n".join(documents[:8])[:24_000], encoding="utf-8")
    (folder / "notes").mkdir()
    for number in range(6):
        (folder / "notes" / f"{number}.txt").write_text(documents[10 + number][:4_000], encoding="utf-8")
    return folder


def mapping(corpus: Path, tokenizer_directory: Path, **data: Any) -> dict[str, Any]:
    train = [{"path": str(corpus / "book.txt"), "name": "book"}]
    given = {"train": train, "validation": {"heldout": {"share": 0.1}}, **data}
    return run_mapping(corpus, corpus, tokenizer_directory, data=given, train={"epochs": 2, "steps": None})


def opened(mapping: dict[str, Any], tokenizer: TextTokenizer) -> tuple[RunData, list[str]]:
    lines: list[str] = []
    return open_run_data(as_config(mapping), tokenizer, lines.append), lines


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("document_mask", [True, False])
def test_no_block_is_trained_on_and_its_two_sides_are_not_joined(
    corpus: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer, packing: str, document_mask: bool
) -> None:
    given = mapping(corpus, tiny_tokenizer_directory, packing=packing, document_mask=document_mask)
    data, lines = opened(given, tokenizer)
    store, [text] = data.stores[0], data.held_out_texts
    assert text.name == "heldout"
    assert any("16 blocks of" in line and "from 1 long document" in line for line in lines)
    held = np.zeros(store.num_tokens, dtype=bool)
    for block in text.parts[0][1].tolist():
        _, start = store.origin(block, 0)
        held[start : start + store.document_lengths[block]] = True
    assert 0.09 < held.mean() < 0.11
    sizes = run_sizes(as_config(given).train, 64, data.order.sequences_per_epoch)
    seen = np.zeros(store.num_tokens, dtype=np.int64)
    for index in range(sizes.total_sequences):
        for part in data.order.sequence(index).ranges:
            assert data.order.sources[0].whole_document(part.document) == 0  # as spikes name it
            _, start = store.origin(part.document, part.start)
            seen[start : start + part.count] += 1
    assert (seen[~held] == 2).all()  # two epochs of everything else
    assert not seen[held].any()
    # labels too: the token after a piece, the first one of a held-out block, is nobody's label, nor is what is packed behind it
    labels = 0
    for number, step in enumerate(Loader(data.order, data.stores, sizes, document_mask=document_mask)):
        rows = torch.cat([batch.labels for batch in step.batches]).numpy()
        labels += int((rows != IGNORE_INDEX).sum())
        assert step.counts.num_label_tokens == int((rows != IGNORE_INDEX).sum())
        for row, index in zip(rows, sizes.sequences_of_step(number), strict=True):
            end = 0
            for part in data.order.sequence(index).ranges:
                end += part.count
                stops = part.start + part.count == store.document_lengths[part.document]
                assert not stops or part.document not in store.open_ended or row[end - 1] == IGNORE_INDEX
    if document_mask:
        pieces = data.order.sources[0].trained_lengths
        assert labels == 2 * int((pieces - 1).sum())


def test_bytes_that_the_store_has_read_do_not_hide_those_of_its_pieces(
    corpus: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer
) -> None:
    whole = opened(mapping(corpus, tiny_tokenizer_directory, validation={}), tokenizer)[0].stores[0]
    assert isinstance(whole, TokenStore)
    assert whole.text_bytes is not None
    cut = CutStore(whole, np.array([[0, 2, 5]]))
    assert cut.text_bytes is not None
    assert cut.text_bytes.tolist() == [*whole.text_bytes.tolist(), UNKNOWN_BYTES]


def test_every_source_has_a_text_of_its_own_with_its_role(
    corpus: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer
) -> None:
    train = [
        {"path": str(corpus / "book.txt"), "name": "book", "weight": 0.9},
        {"path": str(corpus / "notes"), "name": "general", "weight": 0.1, "role": "replay"},
    ]
    data, _ = opened(mapping(corpus, tiny_tokenizer_directory, train=train), tokenizer)
    assert [(text.name, text.role) for text in data.held_out_texts] == [("book", None), ("general", "general")]
    for text, store in zip(data.held_out_texts, data.stores, strict=True):
        assert text.num_tokens == pytest.approx(0.1 * store.num_tokens, rel=0.1)
    ledger = data.ledger(
        sequences_seen=0, tokens_by_source=[], skipped_tokens={}, padding_tokens=0, data_changes=[], spikes=[]
    )["sources"]
    assert [row["tokens_held_out"] for row in ledger] == [text.num_tokens for text in data.held_out_texts]
    both = {"heldout": {"share": 0.1}, "general": {"path": str(corpus / "notes" / "1.txt")}}
    named, _ = opened(mapping(corpus, tiny_tokenizer_directory, train=train, validation=both), tokenizer)
    assert [text.name for text in named.held_out_texts] == ["book", "heldout general", "general"]


def test_a_longer_run_and_another_seed_hold_out_the_same(
    corpus: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer
) -> None:
    given = mapping(corpus, tiny_tokenizer_directory)
    longer = {**given, "train": {**given["train"], "epochs": 9}, "run": {**given["run"], "seed": 99}}
    one, two = opened(given, tokenizer)[0], opened(longer, tokenizer)[0]
    assert one.order.sources[0].held_out == two.order.sources[0].held_out != ""
    assert one.order.describe()["sources"] == two.order.describe()["sources"]


def test_align_to_bos_holds_out_whole_documents_only(
    corpus: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer
) -> None:
    notes = [{"path": str(corpus / "notes"), "name": "notes"}]
    validation = {"heldout": {"share": 0.3}}
    given = mapping(corpus, tiny_tokenizer_directory, train=notes, align_to_bos=True, validation=validation)
    data, _ = opened(given, tokenizer)
    store, held = data.held_out_texts[0].parts[0]
    assert 1 <= len(held) <= 3
    assert len(store.document_lengths) == 6
    assert data.stores[0].open_ended == frozenset()


def test_megatron_order_names_what_holds_out_there(corpus: Path, tiny_tokenizer_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.split holds out the validation share"):
        as_config(mapping(corpus, tiny_tokenizer_directory, order="megatron"))


def test_a_run_of_an_earlier_version_keeps_what_it_held_out(
    corpus: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer
) -> None:
    given = mapping(corpus, tiny_tokenizer_directory, train=[{"path": str(corpus / "notes")}])
    given["data"]["validation"] = {"heldout": {"share": 0.5}}
    saved = as_config(given).to_mapping()
    del saved["data"]["validation"]["heldout"]["share_of"]  # as versions before the key wrote it
    assert as_saved(saved)["data"]["validation"]["heldout"]["share_of"] == "documents"
    lines: list[str] = []
    kept = keep_settled(as_config(given), as_saved(saved), lines.append)
    assert kept.data.validation["heldout"].share_of == "documents"
    assert "with which the run began" in lines[0]
    data = open_run_data(kept, tokenizer, print)
    store, [text] = data.stores[0], data.held_out_texts
    chosen = store.content_hashes < np.uint64(0.5 * 2**64)
    assert np.array_equal(text.parts[0][1], np.flatnonzero(chosen))
    assert "held_out" not in data.order.describe()["sources"][0]  # the fingerprint of such a run stays what it was
    assert keep_settled(as_config(given), as_config(given).to_mapping(), print) == as_config(given)


def test_a_held_out_text_that_is_trained_on_is_named(
    corpus: Path, tiny_tokenizer_directory: Path, tokenizer: TextTokenizer
) -> None:
    notes = [{"path": str(corpus / "notes"), "name": "notes"}]
    both = {
        "seen": {"path": [str(corpus / "notes" / "1.txt"), str(corpus / "book.txt")]},
        "general": {"path": str(corpus / "book.txt")},
    }
    _, lines = opened(mapping(corpus, tiny_tokenizer_directory, train=notes, validation=both), tokenizer)
    [line] = [line for line in lines if "also trained on" in line]
    assert line.startswith("warning: data.validation.seen: 1 of its 2 documents (")
    assert "in notes" in line
    book = [{"path": str(corpus / "book.txt"), "name": "book"}]
    _, lines = opened(
        mapping(corpus, tiny_tokenizer_directory, train=book, validation={"x": book[0] | {"name": None}}), tokenizer
    )
    assert any("data.validation.x: all of it" in line for line in lines)
