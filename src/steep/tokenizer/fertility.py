"""`steep tokenizer fertility`: how well a tokenizer fits a text, and whether more tokens would pay off.

In: texts. Out: bytes per token, tokens per word, the words that cost most, and what a continued vocabulary would save, measured
on a tenth of the text that the new tokens were not chosen from. Words are separated by white space. Weakness: what a saving is
worth depends on the model; an embedding costs memory, and learning it costs text (30,000 sentences: arXiv:2406.11477).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional, Union

from steep.core.errors import DataError
from steep.core.public import Readable, public
from steep.core.units import format_count
from steep.sources.inputs import read_texts
from steep.tokenizer.bpe import can_continue, continue_merges, count_tokens, count_words, split_pieces, with_merges
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer

SHOWN_WORDS = 12
TRIED_TOKENS = 1000
"""New tokens with which the advice is measured."""

WORTH_RATIO = 0.10
"""Share of tokens saved from which new tokens are advised; a smaller gain pays for itself slowly. A judgement, not a finding."""


@dataclass(frozen=True)
class Fertility:
    """How a tokenizer splits a text."""

    name: str
    text_bytes: int
    tokens: int
    words: int
    whole_words_ratio: float
    """Words that are one token, weighted by how often they occur."""
    unknown_tokens: int
    costliest: list[tuple[str, int, int]]
    """(word, how often it occurs, its tokens), ordered by the tokens that one token for each word would save."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token; more is better."""
        return self.text_bytes / max(1, self.tokens)

    @property
    def tokens_per_word(self) -> float:
        """The fertility; 1 is the minimum."""
        return self.tokens / max(1, self.words)

    def to_text(self) -> str:
        """One line."""
        unknown = f", {self.unknown_tokens:,} unknown tokens" if self.unknown_tokens else ""
        return (
            f"{self.name}: {format_count(self.text_bytes)} bytes, {format_count(self.tokens)} tokens, {self.bytes_per_token:.3f} "
            f"bytes per token, {self.tokens_per_word:.3f} tokens per word, {self.whole_words_ratio:.1%} of words whole{unknown}"
        )


@dataclass(frozen=True, repr=False)
class FertilityReport(Readable):
    """A text, another to compare with, and the advice."""

    text: Fertility
    general: Fertility | None
    saved_ratio: float | None
    """Tokens that TRIED_TOKENS more tokens save on held-out text; None for a tokenizer whose merges cannot be continued."""

    @property
    def advice(self) -> str:
        """What to do, with the number that decides."""
        if self.saved_ratio is None:
            saving = sum(count * (tokens - 1) for _, count, tokens in self.text.costliest) / max(1, self.text.tokens)
            return (
                f"its merges cannot be continued; one token for each of the {len(self.text.costliest)} words above would save "
                f"{saving:.1%} of the tokens (vocabulary.add)"
            )
        what = f"{TRIED_TOKENS:,} more tokens save {self.saved_ratio:.1%} of the tokens of held-out text"
        if self.saved_ratio >= WORTH_RATIO:
            return f"extend: {what}; steep tokenizer extend makes them"
        return f"leave it: {what}, and {WORTH_RATIO:.0%} is where training their embeddings begins to pay"

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        texts = [
            {**asdict(text), "bytes_per_token": text.bytes_per_token, "tokens_per_word": text.tokens_per_word}
            for text in (self.text, self.general)
            if text is not None
        ]
        return {"texts": texts, "saved_ratio": self.saved_ratio, "advice": self.advice}

    def to_text(self) -> str:
        lines = [text.to_text() for text in (self.text, self.general) if text is not None]
        costliest = ", ".join(f"{word} {count:,} x {tokens}" for word, count, tokens in self.text.costliest)
        return "\n".join([*lines, f"words that cost most (times x tokens): {costliest}", self.advice])


@public
def tokenizer_fertility(
    texts: Union[str, Sequence[str]], *, tokenizer: str, general: Optional[str] = None
) -> FertilityReport:
    """How well a tokenizer fits texts, and whether more tokens would pay, measured on text that they were not chosen from.

    texts: files, folders or globs. tokenizer: hub id, folder, tokenizer.json, .gguf file, or run. general: text of another kind
    to compare with. Raises DataError or ModelError for what cannot be read, and for a text without words.
    """
    base: Any = load_hf_tokenizer(tokenizer)
    documents = read_texts(texts)
    other = None if general is None else read_texts(general)
    backend = base.backend_tokenizer
    saved = None
    if can_continue(backend):
        chosen, held_out = split_pieces(documents)
        merges = continue_merges(backend, count_words(backend, chosen), TRIED_TOKENS)
        more = type(backend).from_str(with_merges(backend.to_str(), merges))
        before, after = count_tokens(backend, held_out), count_tokens(more, held_out)
        saved = (before - after) / max(1, before)
    of_other = None if other is None else fertility(base, other, "general text")
    return FertilityReport(fertility(base, documents, "this text"), of_other, saved)


def fertility(tokenizer: Any, texts: Iterable[str], name: str) -> Fertility:
    """How the tokenizer splits `texts`."""
    backend = tokenizer.backend_tokenizer
    unknown = tokenizer.unk_token_id
    words: Counter[str] = Counter()
    text_bytes = tokens = unknowns = 0
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        tokens += len(ids)
        unknowns += ids.count(unknown) if unknown is not None else 0
        text_bytes += len(text.encode("utf-8", "surrogatepass"))
        words.update(text.split())
    if not words:
        raise DataError(f"{name} holds no word")
    number = sum(words.values())
    encoded = backend.encode_batch([f" {word}" for word in words], add_special_tokens=False)
    lengths = dict(zip(words, (len(encoding.ids) for encoding in encoded), strict=True))
    ranked = sorted(words, key=lambda word: (-words[word] * (lengths[word] - 1), word))
    return Fertility(
        name,
        text_bytes,
        tokens,
        number,
        sum(count for word, count in words.items() if lengths[word] == 1) / number,
        unknowns,
        [(word, words[word], lengths[word]) for word in ranked[:SHOWN_WORDS] if lengths[word] > 1],
    )
