"""`steep tokenizer extend`: continue a tokenizer's own BPE on domain text.

In: a byte-pair tokenizer and text. Out: the same tokenizer with more merges after its own, written as a folder (`tokenizer.bpe`).
Tokens that are trained elsewhere and appended are often never reached; these are. No old token or merge changes, so a text that
holds no new token keeps its ids.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from steep.core.errors import ConfigError, DataError, ModelError
from steep.core.files import atomic_folder
from steep.core.public import Readable, public
from steep.sources.inputs import read_texts
from steep.tokenizer.bpe import (
    can_continue,
    continue_merges,
    count_tokens,
    count_words,
    split_pieces,
    unreachable,
    with_merges,
)
from steep.tokenizer.encode import make_text_tokenizer
from steep.tokenizer.hard_strings import hard_strings
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer


@dataclass(frozen=True, repr=False)
class ExtendResult(Readable):
    """An extended tokenizer on disk."""

    path: Path
    tokens: list[str]
    """The new tokens as text, most frequent first; bytes that are not a whole character are shown as escapes."""
    bytes_per_token_before: float
    """On pieces of the text that no token was chosen from."""
    bytes_per_token_after: float
    unreachable: list[str]
    """New tokens that the tokenizer never gives; none is expected."""
    unused: int
    """New tokens that do not occur in the whole text: parts of longer ones."""

    def to_text(self) -> str:
        change = self.bytes_per_token_after / self.bytes_per_token_before - 1
        never = ", ".join(map(repr, self.unreachable[:10])) or "none"
        return (
            f"{self.path}: {len(self.tokens):,} new tokens, such as {', '.join(map(repr, self.tokens[:12]))}\n"
            f"bytes per token on held-out text: {self.bytes_per_token_before:.3f} before, "
            f"{self.bytes_per_token_after:.3f} after ({change:+.1%})\n"
            f"unreachable: {never}; {self.unused:,} occur only inside longer ones\n"
            f"train it: vocabulary: {{add: {self.path}}}"
        )


@public
def tokenizer_extend(
    texts: Union[str, Sequence[str]], *, tokenizer: str, out: Union[str, os.PathLike[str]], tokens: int = 1000
) -> ExtendResult:
    """Continue a BPE tokenizer on texts and write it to the folder `out`, for `vocabulary: {add: out}`.

    texts: files, folders or globs. tokenizer: hub id, folder, tokenizer.json, .gguf file, or run. tokens: how many to add. Old
    tokens keep their ids. Raises ModelError for a tokenizer that is not BPE, ConfigError for a folder that exists, DataError for
    text that gives no new token.
    """
    from tokenizers import Tokenizer

    base: Any = load_hf_tokenizer(tokenizer)
    documents, folder = read_texts(texts), Path(out)
    backend = base.backend_tokenizer
    if not can_continue(backend):
        kind = type(backend.model).__name__
        what = "does not cut text into words before it merges" if kind == "BPE" else f"is a {kind} tokenizer"
        raise ModelError(
            f"{base.name_or_path} {what}, so its vocabulary cannot be continued by merges; name the words themselves in "
            "vocabulary.add, as a list or a file"
        )
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name another folder")
    chosen, held_out = split_pieces(documents)
    merges = continue_merges(backend, count_words(backend, chosen), tokens)
    if not merges.pairs:
        raise DataError("the text has no pair of tokens that occurs twice and is not a token already; nothing to add")
    extended = Tokenizer.from_str(with_merges(backend.to_str(), merges))
    _write(base, extended, folder)
    words = count_words(backend, documents)
    produced = {part.value for word in words for part in extended.model.tokenize(word)}
    size = sum(len(piece.encode("utf-8", "surrogatepass")) for piece in held_out)
    vocabulary = extended.get_vocab()
    shown = ((token, extended.decode([vocabulary[token]])) for token in merges.tokens)
    return ExtendResult(
        folder,
        [token if "\N{REPLACEMENT CHARACTER}" in text else text for token, text in shown],
        size / max(1, count_tokens(backend, held_out)),
        size / max(1, count_tokens(extended, held_out)),
        unreachable(extended, merges.tokens),
        sum(token not in produced for token in merges.tokens),
    )


def _write(tokenizer: Any, extended: Any, out: Path) -> None:
    """Write a folder that transformers and steep read, complete or not at all. Raises ModelError."""
    from transformers import PreTrainedTokenizerFast

    names = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=extended, **names)
    wrapped.chat_template = getattr(tokenizer, "chat_template", None)
    with atomic_folder(out) as temporary:
        wrapped.save_pretrained(temporary)
        _check(tokenizer, extended, load_hf_tokenizer(str(temporary)))


def _check(tokenizer: Any, extended: Any, again: Any) -> None:
    """Raise ModelError if the written folder is read back as another tokenizer."""
    ids = again.get_vocab()
    moved = [token for token, number in tokenizer.get_vocab().items() if ids.get(token) != number]
    if moved:
        raise ModelError(
            f"not written: transformers reads {len(moved):,} old tokens back with other ids, for example {moved[0]!r}"
        )
    plain = make_text_tokenizer(extended, bos_id=None, eos_id=None, append_eos=False, prepend_bos=False)
    for name, text in hard_strings(plain).items():
        if again(text, add_special_tokens=False)["input_ids"] != extended.encode(text, add_special_tokens=False).ids:
            raise ModelError(
                f"not written: transformers reads the tokenizer back with other ids for {name} ({text[:40]!r})"
            )
