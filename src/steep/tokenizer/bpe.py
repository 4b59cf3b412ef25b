"""Continuing a byte-pair tokenizer: count the words of a text, learn the next merges, write them into tokenizer.json.

Source: BPE (Sennrich et al. 2016, arXiv:1508.07909), continued from the segmentation that the tokenizer gives
(arXiv:2512.03989). Weakness: words are cut by the tokenizer's own rule, so no token is learned across a space.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PIECE_CHARACTERS, HELD_OUT_EVERY = 4000, 10
FEWEST = 2
"""A pair that occurs less often makes no token."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Merges:
    """What was learned, in order."""

    pairs: list[Pair]
    counts: list[int]
    """How often each pair occurred when it was merged."""

    @property
    def tokens(self) -> list[str]:
        """The new tokens, in the tokenizer's own alphabet."""
        return [left + right for left, right in self.pairs]


def can_continue(backend: Any) -> bool:
    """Whether the tokenizer merges pairs inside words: BPE that cuts text into words first.

    A tokenizer that does not (SentencePiece's, as in Llama 2 and Gemma) would learn tokens across words, and a text would be one
    long word to count.
    """
    return type(backend.model).__name__ == "BPE" and backend.pre_tokenizer is not None


def count_words(backend: Any, texts: Iterable[str]) -> Counter[str]:
    """The pieces that the tokenizer's own rule cuts texts into, in its alphabet, and how often each occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        counts.update(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return counts


def continue_merges(backend: Any, words: Counter[str], tokens: int) -> Merges:
    """The next `tokens` merges of the tokenizer on counted words; fewer if no pair is left that occurs twice.

    Of pairs that occur equally often, the first in code-point order is taken. A pair whose token exists is left alone: merging it
    would change how old text is split.
    """
    known = set(backend.get_vocab(with_added_tokens=True))
    pieces = [[part.value for part in backend.model.tokenize(word)] for word in words]
    weights = list(words.values())
    counts: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = {}
    for number, parts in enumerate(pieces):
        for pair in itertools.pairwise(parts):
            counts[pair] += weights[number]
            where.setdefault(pair, set()).add(number)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges = Merges([], [])
    while heap and len(merges.pairs) < tokens:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            if counts[pair] > 0 and -count > counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < FEWEST:
            break
        if "".join(pair) in known:
            continue
        merges.pairs.append(pair)
        merges.counts.append(-count)
        known.add("".join(pair))
        for changed in _merge_everywhere(pair, pieces, weights, counts, where):
            heapq.heappush(heap, (-counts[changed], changed))
    return merges


def _merge_everywhere(
    pair: Pair, pieces: list[list[str]], weights: list[int], counts: Counter[Pair], where: dict[Pair, set[int]]
) -> set[Pair]:
    """Merge `pair` in every word that has it. Returns the pairs that have become more frequent."""
    grown: set[Pair] = set()
    for number in sorted(where.pop(pair)):
        parts, weight = pieces[number], weights[number]
        for old in itertools.pairwise(parts):
            counts[old] -= weight
        pieces[number] = parts = merge(parts, pair)
        for new in itertools.pairwise(parts):
            counts[new] += weight
            where.setdefault(new, set()).add(number)
            grown.add(new)
    counts.pop(pair, None)
    return grown


def merge(parts: list[str], pair: Pair) -> list[str]:
    """`parts` with every occurrence of `pair` merged, from the left."""
    merged: list[str] = []
    position = 0
    while position < len(parts):
        found = tuple(parts[position : position + 2]) == pair
        merged.append("".join(pair) if found else parts[position])
        position += 2 if found else 1
    return merged


def with_merges(tokenizer_json: str, merges: Merges) -> str:
    """tokenizer.json with the merges after its own, and ids for their tokens after all existing ones.

    Added tokens outside the model's vocabulary (special ones in the files of Qwen and Llama 3) are written into it: when
    `tokenizers` reads the file it numbers them after the vocabulary, whatever id the file gives, so a longer one would move them.
    """
    content = json.loads(tokenizer_json)
    model = content["model"]
    for token in content.get("added_tokens", []):
        model["vocab"].setdefault(token["content"], token["id"])
    for number, token in enumerate(merges.tokens, max(model["vocab"].values()) + 1):
        model["vocab"][token] = number
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in merges.pairs]
    return json.dumps(content, ensure_ascii=False)


def unreachable(backend: Any, tokens: Iterable[str]) -> list[str]:
    """The tokens that the tokenizer does not give even for their own text."""
    return [token for token in tokens if [part.value for part in backend.model.tokenize(token)] != [token]]


def split_pieces(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts cut at line ends into pieces of a few thousand characters: those to choose from, and each tenth one, held out."""
    pieces: list[str] = []
    for text in texts:
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= PIECE_CHARACTERS:
                pieces.append("".join(piece))
                piece, size = [], 0
        pieces.append("".join(piece))
    pieces = [piece for piece in pieces if piece]
    held_out = pieces[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY] or pieces[-1:]
    chosen = [piece for number, piece in enumerate(pieces) if number % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return chosen or pieces, held_out


def count_tokens(backend: Any, texts: Iterable[str]) -> int:
    """Tokens of all texts."""
    return sum(len(encoding.ids) for encoding in backend.encode_batch(list(texts), add_special_tokens=False))
