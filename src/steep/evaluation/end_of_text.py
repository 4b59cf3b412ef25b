"""Does the model learn to stop, and can the program that serves it tell? In: data, held-out documents, files. Out: an audit.

Three things must hold. Documents in the data end with the end-of-text token (EOS), or nothing teaches it. The model gives it
where a document truly ends: its probability there, and the share of ends where it is the most probable token (the stop rate),
before and after. And tokenizer, generation_config and the written folders name the same token, or generation runs to its length
limit. Weakness: only END_DOCUMENTS documents per text are examined, with END_TOKENS tokens of context, so a stop rate has a
standard error of a few points, and a document cut off mid-sentence when it was collected counts as an end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steep.core.public import Readable
from steep.order.batches import open_pieces
from steep.order.data_order import OrderedSequence
from steep.order.packing import TokenRange

if TYPE_CHECKING:
    import torch

    from steep.batch import Batch
    from steep.data.held_out_text import HeldOutText
    from steep.loader import TokenReader
    from steep.store.reader import TokenStore
    from steep.store.stream import StreamSource
    from steep.tokenizer.encode import TextTokenizer

    LogitsAt = Callable[[Batch, torch.Tensor], torch.Tensor]
    """(batch, positions_K) -> logits_KV, where positions_K are indices into the batch's B*T flattened positions."""

DATA_DOCUMENTS = 2_000
"""Documents per source whose last token is read, spread evenly over the source."""
END_DOCUMENTS = 48
"""Documents per held-out text at whose end the model is scored, spread evenly over the text."""
FEWEST_ENDS = 2
END_TOKENS = 512
"""Most tokens of context before the end; never more than a sequence of the run."""
ALL_RATIO = 0.99
"""From this share on, a source counts as ending with EOS: the first or last piece of a foreign file may not."""
FALL_RATIO = 0.1
"""A fall of the stop rate by more than this (absolute) gives a warning: about twice its standard error."""

SAYS_EOS = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class SourceEnds:
    """How the documents of a training source end."""

    source: str
    documents: int | None
    """Number examined; None for a stream, whose documents get EOS or not as the tokenizer section says."""
    ended_ratio: float
    """Share of them whose last token is EOS."""


@dataclass(frozen=True)
class StopScore:
    """How well a model recognizes the true ends of documents."""

    documents: int
    eos_probability: float
    """Mean probability of EOS there."""
    stop_ratio: float
    """Share of the ends where EOS is the most probable token: where greedy generation would stop."""


@dataclass(frozen=True, repr=False)
class EndOfTextAudit(Readable):
    """Data, model and files together."""

    eos_id: int | None
    eos_token: str | None
    sources: list[SourceEnds]
    before: StopScore | None
    after: StopScore | None
    ids: dict[str, list[int]]
    """The end-of-text ids that each file names; files that name none are left out."""

    @property
    def warnings(self) -> list[str]:
        """One sentence per problem."""
        if self.eos_id is None:
            return ["the tokenizer has no end-of-text token, so the model cannot learn to stop"]
        found = data_warnings(self.sources, self.eos_token)
        if (
            self.before
            and self.after
            and self.before.stop_ratio - self.after.stop_ratio > _least_fall(self.after.documents)
        ):
            rates = f"{100 * self.before.stop_ratio:.0f} % to {100 * self.after.stop_ratio:.0f} %"
            found.append(f"the stop rate fell from {rates}: the model now runs on where it used to stop")
        return found + [
            f"{place} names {_ids(ids)} as end of text, but training ends documents with {self.eos_id}: a program that "
            "reads it will not stop where the model does"
            for place, ids in self.ids.items()
            if self.eos_id not in ids
        ]

    def to_mapping(self) -> dict[str, Any]:
        """The audit as JSON values: `end_of_text` of summary.json."""
        return {**asdict(self), "warnings": self.warnings}

    def to_text(self) -> str:
        return "\n".join(audit_lines(self.to_mapping()))


def _least_fall(documents: int) -> float:
    """The smallest fall of the stop rate of so many documents that is not chance: about twice its standard error."""
    return max(FALL_RATIO, FALL_RATIO * (END_DOCUMENTS / max(1, documents)) ** 0.5)


def audit_lines(audit: Mapping[str, Any]) -> list[str]:
    """The lines of an audit's mapping: what the console and `steep evaluate` print."""
    name = f"{audit['eos_token']}, id {audit['eos_id']}" if audit["eos_id"] is not None else "none"
    lines = [f"end of text ({name})"]
    lines += [f"  data: {_source_words(source)}" for source in audit["sources"]]
    for label in ("before", "after"):
        score = audit[label]
        if score is not None:
            lines.append(
                f"  {label + ':':<7} probability {score['eos_probability']:.3f} at the true ends of {score['documents']} "
                f"held-out documents, stops at {100 * score['stop_ratio']:.0f} % of them"
            )
    if audit["ids"]:
        lines.append("  ids: " + ", ".join(f"{place} {_ids(ids)}" for place, ids in audit["ids"].items()))
    return [*lines, *(f"  warning: {warning}" for warning in audit["warnings"])]


def _source_words(source: Mapping[str, Any]) -> str:
    if source["documents"] is None:
        return f"{source['source']}, a stream: {'every' if source['ended_ratio'] else 'no'} document ends with it"
    return f"{source['source']}: {100 * source['ended_ratio']:.1f} % of {source['documents']:,} documents end with it"


def _ids(ids: Sequence[int]) -> str:
    return " or ".join(map(str, ids)) or "nothing"


# ---- the data ----


def source_ends(
    names: Sequence[str], stores: Sequence[TokenStore | StreamSource], tokenizer: TextTokenizer, document_mask: bool
) -> list[SourceEnds]:
    """How the documents of each training source end, from the stores' own boundaries.

    document_mask: as in the data section. Without it an EOS that begins the next document also ends this one, since the label of
    the last token is then that EOS. nanoGPT and llm.c write their files so.
    """
    return [_source_ends(name, store, tokenizer, document_mask) for name, store in zip(names, stores, strict=True)]


def _source_ends(
    name: str, store: TokenStore | StreamSource, tokenizer: TextTokenizer, document_mask: bool
) -> SourceEnds:
    if not store.num_documents:
        return SourceEnds(name, None, float(tokenizer.append_eos))
    documents = _spread(np.arange(store.num_documents), DATA_DOCUMENTS)
    documents = documents[np.asarray(store.document_lengths)[documents] > 0]
    ended = sum(
        tokenizer.eos_id in (_token(store, document, -1), None if document_mask else _token(store, document, 0))
        for document in map(int, documents)
        if tokenizer.eos_id is not None
    )
    return SourceEnds(name, len(documents), ended / len(documents) if len(documents) else 0.0)


def data_warnings(sources: Sequence[SourceEnds], eos_token: str | None) -> list[str]:
    """One line for each source whose documents do not end with EOS."""
    name = eos_token or "an end-of-text token"
    remedy = "prepare it with tokenizer.append_eos true"
    return [
        f"no document of {source.source} ends with {name}: the model will not learn to stop from it; {remedy}"
        if source.ended_ratio == 0
        else f"only {100 * source.ended_ratio:.1f} % of the documents of {source.source} end with {name}: the others teach the "
        f"model to run on; {remedy}"
        for source in sources
        if source.ended_ratio < ALL_RATIO
    ]


def _spread(documents: Any, most: int) -> Any:
    """At most `most` of them, evenly spread."""
    count = min(most, len(documents))
    return documents[np.arange(count) * len(documents) // max(1, count)]


def _token(store: TokenReader, document: int, position: int) -> int:
    """One token of a document; counted from its end if `position` is negative."""
    out = np.empty(1, dtype=np.int64)
    store.read(document, position if position >= 0 else int(store.document_lengths[document]) + position, 1, out)
    return int(out[0])


# ---- the model ----


def measure_stops(
    logits_at: LogitsAt,
    texts: Sequence[HeldOutText],
    eos_id: int | None,
    *,
    sequence_length: int,
    batch_size: int,
    tokens: int | None = None,
) -> StopScore | None:
    """The model's probability of EOS at the true ends of held-out documents. None without EOS or without documents.

    The context is the end of the document without its EOS. Attention stays inside each document, as in scoring. tokens: what is
    scored of each text; the ends have at most half as many, or FEWEST_ENDS documents.
    """
    if eos_id is None:
        return None
    probabilities: list[float] = []
    stops = 0
    for batch, positions_K in _end_batches(texts, eos_id, sequence_length, batch_size, tokens):
        logits_KV = logits_at(batch, positions_K).float()
        probabilities += logits_KV.softmax(-1)[:, eos_id].tolist()
        stops += int((logits_KV.argmax(-1) == eos_id).sum())
    if not probabilities:
        return None
    return StopScore(len(probabilities), sum(probabilities) / len(probabilities), stops / len(probabilities))


def _end_batches(
    texts: Sequence[HeldOutText], eos_id: int, sequence_length: int, batch_size: int, tokens: int | None
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Batches of the ends of documents of each text, and (K,) the index of the last token of each end in the batch's B*T
    flattened positions."""
    import torch

    from steep.loader import make_batch  # torch is heavy, and the report reads audits without it

    for text in texts:
        stores = [store for store, _ in text.parts]
        most = _num_ends(text, min(END_TOKENS, sequence_length), tokens)
        share = max(1, most // max(1, len(stores)))
        rows = [
            OrderedSequence(part, ranges)
            for part, (store, documents) in enumerate(text.parts)
            for ranges in _rows(_ends(store, _ended(store, documents, share), eos_id, sequence_length), sequence_length)
        ]
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            positions = [
                row * sequence_length + int(stop) - 1
                for row, sequence in enumerate(chosen)
                for stop in np.cumsum([part.count for part in sequence.ranges])
            ]
            yield make_batch(chosen, stores, sequence_length), torch.tensor(positions)


def _num_ends(text: HeldOutText, most_each: int, tokens: int | None) -> int:
    """How many ends of a text are examined: as many as have, on average, half of `tokens`."""
    lengths = [np.minimum(store.document_lengths[documents], most_each) for store, documents in text.parts]
    each = max(1.0, float(np.concatenate([*lengths, np.ones(1)]).mean()))
    return END_DOCUMENTS if tokens is None else min(END_DOCUMENTS, max(FEWEST_ENDS, int(tokens / 2 / each)))


def _ended(store: TokenReader, documents: Any, most: int) -> Any:
    """At most `most` of them, evenly spread, without blocks that end before their document does."""
    pieces = open_pieces(store)
    return _spread(np.array([d for d in documents.tolist() if d not in pieces]) if pieces else documents, most)


def _ends(store: TokenReader, documents: Any, eos_id: int, sequence_length: int) -> Iterator[TokenRange]:
    """The end of each document, without its EOS."""
    for document in map(int, documents):
        length = int(store.document_lengths[document])
        stop = length - int(length > 0 and _token(store, document, -1) == eos_id)
        if stop > 0:
            count = min(stop, END_TOKENS, sequence_length)
            yield TokenRange(document, stop - count, count)


def _rows(ends: Iterator[TokenRange], sequence_length: int) -> list[list[TokenRange]]:
    """Ends side by side in rows, in their order."""
    rows: list[list[TokenRange]] = []
    room = 0
    for end in ends:
        if end.count > room:
            rows.append([])
            room = sequence_length
        rows[-1].append(end)
        room -= end.count
    return rows


# ---- the files ----


def named_ids(place: str, files: Mapping[str, bytes], token_id: Callable[[str], int | None]) -> dict[str, list[int]]:
    """The end-of-text ids that the files of a model's folder name, by `place` and file. Files that name none are left out.

    files: content by name; generation_config.json, config.json and tokenizer_config.json are read. token_id: the id of a token.
    """
    found: dict[str, list[int]] = {}
    for name in SAYS_EOS:
        value = json.loads(files[name]).get("eos_token_id") if name in files else None
        if value is not None:
            found[f"{place}/{name}"] = list(value) if isinstance(value, list) else [value]
    if "tokenizer_config.json" in files:
        token = json.loads(files["tokenizer_config.json"]).get("eos_token")
        number = None if token is None else token_id(token["content"] if isinstance(token, dict) else token)
        found[f"{place}/tokenizer_config.json"] = [] if number is None else [number]
    return found


def named_ids_of_folders(
    run: Path | None, loaded: str | None, token_id: Callable[[str], int | None]
) -> dict[str, list[int]]:
    """`named_ids` of the folder that a model was loaded from, and of the folders exported from its run."""
    folders = {"model": Path(loaded)} if loaded is not None else {}
    exported = sorted((run / "export").glob("*")) if run is not None else []
    folders |= {f"export/{path.name}": path for path in exported if path.resolve() != Path(loaded or "").resolve()}
    names = (*SAYS_EOS, "tokenizer_config.json")
    found: dict[str, list[int]] = {}
    for place, folder in folders.items():
        files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        found |= named_ids(place, files, token_id)
    return found


def audit(
    tokenizer: TextTokenizer,
    *,
    sources: Sequence[SourceEnds],
    before: StopScore | None,
    after: StopScore | None,
    ids: Mapping[str, list[int]],
) -> EndOfTextAudit:
    """The whole audit, with the tokenizer's own id first."""
    eos_id = tokenizer.eos_id
    own = {} if eos_id is None else {"tokenizer": [eos_id]}
    return EndOfTextAudit(eos_id, tokenizer.eos_token, list(sources), before, after, {**own, **ids})
