"""`steep tokenizer extend`: continue a tokenizer's own BPE on domain text.

In: a byte-pair tokenizer and text. Out: the same tokenizer with more merges after its own, written as a folder. Source: BPE
(Sennrich et al. 2016, arXiv:1508.07909), continued from the segmentation that the tokenizer gives (arXiv:2512.03989): tokens that
are trained elsewhere and appended are often never reached, these are. No old token or merge changes, so a text that holds no new
token keeps its ids. Weakness: words are cut as the tokenizer's own rule cuts them; it cannot learn a token across a space.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from steep.core.errors import ConfigError, DataError, ModelError
from steep.core.files import temporary_path
from steep.core.public import public
from steep.sources.inputs import read_texts
from steep.tokenizer.encode import make_text_tokenizer
from steep.tokenizer.hard_strings import hard_strings
from steep.tokenizer.open import load_hf_tokenizer

FEWEST = 2
"""A pair that is met less often makes no token."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Merges:
    """What was learned, in order."""

    pairs: list[Pair]
    counts: list[int]
    """How often each pair was met when it was merged."""

    @property
    def tokens(self) -> list[str]:
        """The new tokens, in the tokenizer's own alphabet."""
        return [left + right for left, right in self.pairs]


def can_continue(backend: Any) -> bool:
    """Whether the tokenizer merges pairs inside words: BPE that cuts text into words first.

    One that does not (SentencePiece's, as of Llama 2 and Gemma) would learn tokens across words, and a text would be one long
    word to count.
    """
    return type(backend.model).__name__ == "BPE" and backend.pre_tokenizer is not None


def require_bpe(backend: Any, name: str) -> None:
    """Raise ModelError for a tokenizer whose merges cannot be continued."""
    if not can_continue(backend):
        kind = type(backend.model).__name__
        what = "does not cut text into words before it merges" if kind == "BPE" else f"is a {kind} tokenizer"
        raise ModelError(
            f"{name} {what}, so its vocabulary cannot be continued by merges; name the words themselves in vocabulary.add, as a "
            "list or a file"
        )


def count_words(backend: Any, texts: Iterable[str]) -> Counter[str]:
    """The pieces that the tokenizer's own rule cuts texts into, in its alphabet, and how often each occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        counts.update(piece for piece, _ in pieces)
    return counts


def continue_merges(backend: Any, words: Counter[str], tokens: int) -> Merges:
    """The next `tokens` merges of the tokenizer on counted words; fewer where no pair is met twice any more.

    Of pairs met equally often the one first in code-point order is taken. A pair whose token exists is left alone: to merge it
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
    """Merge `pair` in every word that has it; the pairs that have become more frequent."""
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
    """`parts` with every occurrence of `pair` as one, from the left."""
    merged: list[str] = []
    position = 0
    while position < len(parts):
        found = tuple(parts[position : position + 2]) == pair
        merged.append("".join(pair) if found else parts[position])
        position += 2 if found else 1
    return merged


def with_merges(tokenizer_json: str, merges: Merges) -> str:
    """tokenizer.json with the merges after its own, and ids for their tokens after all there are.

    Added tokens outside the model's vocabulary (special ones in the files of Qwen and Llama 3) are written into it: `tokenizers`
    numbers them after the vocabulary when it reads the file, whatever id stands there, so that a longer one would move them.
    """
    content = json.loads(tokenizer_json)
    model = content["model"]
    for token in content.get("added_tokens", []):
        model["vocab"].setdefault(token["content"], token["id"])
    taken = model["vocab"].values()
    first = max(taken) + 1
    for offset, token in enumerate(merges.tokens):
        model["vocab"][token] = first + offset
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in merges.pairs]
    return json.dumps(content, ensure_ascii=False)


def unreachable(backend: Any, tokens: Iterable[str]) -> list[str]:
    """The tokens that the tokenizer's model does not give even for their own text."""
    return [token for token in tokens if [part.value for part in backend.model.tokenize(token)] != [token]]


@dataclass(frozen=True)
class ExtendResult:
    """An extended tokenizer on disk."""

    path: Path
    tokens: list[str]
    """The new tokens as text, most frequent first; bytes that are no whole character are shown as escapes."""
    bytes_per_token_before: float
    """On pieces of the text that no token was chosen from."""
    bytes_per_token_after: float
    unreachable: list[str]
    """New tokens that the tokenizer never gives; none is expected."""
    unused: int
    """New tokens that do not occur on the whole text: parts of longer ones."""

    def to_text(self) -> str:
        """For people."""
        change = self.bytes_per_token_after / self.bytes_per_token_before - 1
        never = ", ".join(map(repr, self.unreachable[:10])) or "none"
        return "\n".join(
            [
                f"{self.path}: {len(self.tokens):,} new tokens, such as {', '.join(map(repr, self.tokens[:12]))}",
                f"bytes per token on held-out text: {self.bytes_per_token_before:.3f} before, "
                f"{self.bytes_per_token_after:.3f} after ({change:+.1%})",
                f"unreachable: {never}; {self.unused:,} occur only inside longer ones",
                f"train it: vocabulary: {{add: {self.path}}}",
            ]
        )

    def __repr__(self) -> str:
        return self.to_text()


@public
def tokenizer_extend(
    texts: Union[str, Sequence[str]], *, tokenizer: str, out: Union[str, os.PathLike[str]], tokens: int = 1000
) -> ExtendResult:
    """Continue a BPE tokenizer on texts and write it to the folder `out`, for `vocabulary: {add: out}`.

    texts: files, folders or globs. tokenizer: hub id, folder, tokenizer.json, .gguf file, or run. tokens: how many to add. Old
    tokens keep their ids. Raises ModelError for a tokenizer that is not BPE, ConfigError for a folder that exists.
    """
    return extend(load_hf_tokenizer(tokenizer), read_texts(texts), tokens, Path(out))


def extend(tokenizer: Any, texts: list[str], tokens: int, out: Path) -> ExtendResult:
    """Learn `tokens` more merges from `texts` and write the tokenizer to the folder `out`, which must not exist yet.

    tokenizer: of transformers. Raises ModelError for one that is not BPE, ConfigError for a folder that is there, DataError where
    the text gives no new token.
    """
    from tokenizers import Tokenizer

    from steep.tokenizer.fertility import count_tokens, split_pieces

    backend = tokenizer.backend_tokenizer
    require_bpe(backend, str(tokenizer.name_or_path))
    if out.exists():
        raise ConfigError(f"{out} exists already; name another folder")
    chosen, held_out = split_pieces(texts)
    merges = continue_merges(backend, count_words(backend, chosen), tokens)
    if not merges.pairs:
        raise DataError("the text has no pair of tokens that occurs twice and is not a token already; nothing to add")
    extended = Tokenizer.from_str(with_merges(backend.to_str(), merges))
    _write(tokenizer, extended, out)
    words = count_words(backend, texts)
    produced = {part.value for word in words for part in extended.model.tokenize(word)}
    size = sum(len(piece.encode("utf-8", "surrogatepass")) for piece in held_out)
    return ExtendResult(
        out,
        [_readable(extended, token) for token in merges.tokens],
        size / max(1, count_tokens(backend, held_out)),
        size / max(1, count_tokens(extended, held_out)),
        unreachable(extended, merges.tokens),
        sum(token not in produced for token in merges.tokens),
    )


def _write(tokenizer: Any, extended: Any, out: Path) -> None:
    """A folder that transformers and steep read, whole or absent: the old tokenizer with more tokens. Raises ModelError."""
    from transformers import PreTrainedTokenizerFast

    names = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=extended, **names)
    wrapped.chat_template = getattr(tokenizer, "chat_template", None)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(out)
    try:
        wrapped.save_pretrained(temporary)
        _check(tokenizer, extended, load_hf_tokenizer(str(temporary)))
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only where it was refused or interrupted


def _check(tokenizer: Any, extended: Any, again: Any) -> None:
    """Raise ModelError where what was written is read back as another tokenizer."""
    ids = again.get_vocab()
    moved = [token for token, number in tokenizer.get_vocab().items() if ids.get(token) != number]
    if moved:
        raise ModelError(
            f"not written: transformers reads {len(moved):,} old tokens back with other ids, {moved[0]!r} for one"
        )
    plain = make_text_tokenizer(extended, bos_id=None, eos_id=None, append_eos=False, prepend_bos=False)
    for name, text in hard_strings(plain).items():
        if again(text, add_special_tokens=False)["input_ids"] != extended.encode(text, add_special_tokens=False).ids:
            raise ModelError(
                f"not written: transformers reads the tokenizer back with other ids for {name} ({text[:40]!r})"
            )


def _readable(backend: Any, token: str) -> str:
    text: str = backend.decode([backend.token_to_id(token)])
    return text if "\N{REPLACEMENT CHARACTER}" not in text else token
