"""A tokenizer with more tokens than the model's own. In: the `vocabulary` section. Out: the tokenizer, and what new tokens were.

New ids follow the old ones, so no old token changes. Main choice: listed tokens are found in text before anything else is split
(as added tokens of `tokenizers`, not special ones), as people expect of product names; a tokenizer folder from
`steep tokenizer extend` splits by its own merges. Weakness: an added token is also found inside longer words.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from steep.core.errors import ConfigError, ModelError
from steep.tokenizer.config import VocabularyConfig
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Extension:
    """The tokenizer of a run, and what its new tokens were before."""

    tokenizer: PreTrainedTokenizerBase
    subtokens: dict[int, list[int]]
    """For each new id the old ids of its text, at least one."""

    @property
    def rows(self) -> int:
        """Embeddings that the tokenizer needs: its largest id + 1."""
        return 1 + max(self.tokenizer.get_vocab().values())


def extend_tokenizer(base: PreTrainedTokenizerBase, config: Optional[VocabularyConfig]) -> Optional[Extension]:
    """`base` with the tokens of the section; None without one. Raises ConfigError, ModelError for what cannot be added."""
    if config is None:
        return None
    folder = Path(config.add).expanduser() if isinstance(config.add, str) else None
    if folder is not None and folder.is_dir():
        return _from_folder(base, folder)
    return _with_tokens(base, new_tokens(config.add))


def new_tokens(add: str | Sequence[str]) -> list[str]:
    """The tokens of a list, or of a file with one on each line. Raises ConfigError for none, or for one that is named twice."""
    if isinstance(add, str):
        path = Path(add).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"vocabulary.add: {add} is neither a file nor a folder; give a list of tokens, a file with one on each line, or "
                "a folder that steep tokenizer extend wrote"
            )
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    else:
        tokens = list(add)
    if not tokens:
        raise ConfigError("vocabulary.add: holds no token")
    if not all(token.strip() for token in tokens):
        raise ConfigError("vocabulary.add: holds an empty token (in a file, a blank line)")
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if twice:
        raise ConfigError(f"vocabulary.add: {', '.join(map(repr, twice[:5]))} is named more than once")
    return tokens


def _with_tokens(base: Any, tokens: list[str]) -> Extension:
    from tokenizers import AddedToken

    known = base.get_vocab()
    ids = {token: base(token, add_special_tokens=False)["input_ids"] for token in tokens}
    there = [token for token in tokens if token in known or len(ids[token]) == 1]
    if there:
        shown = ", ".join(map(repr, there[:5])) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
        raise ConfigError(f"vocabulary.add: {shown}: one token already; remove it")
    extended = copy.deepcopy(base)
    extended.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    vocabulary = extended.get_vocab()
    return Extension(extended, {vocabulary[token]: ids[token] for token in tokens})


def _from_folder(base: Any, folder: Path) -> Extension:
    from tokenizers import Tokenizer

    extended: Any = load_hf_tokenizer(str(folder))
    before, after = base.get_vocab(), extended.get_vocab()
    moved = [token for token, number in before.items() if after.get(token) != number]
    if moved:
        raise ModelError(
            f"vocabulary.add: {folder} does not extend the model's tokenizer: {len(moved):,} of its {len(before):,} tokens "
            f"have another id there, for example {moved[0]!r}. Make it with steep tokenizer extend --tokenizer <the model>"
        )
    added = sorted(set(after.values()) - set(before.values()))
    if not added:
        raise ConfigError(f"vocabulary.add: {folder} has no token that the model's own tokenizer lacks")
    model = Tokenizer.from_str(base.backend_tokenizer.to_str()).model
    names = {number: token for token, number in after.items()}
    subtokens = {}
    for number in added:
        name = names[number]
        if number in extended.added_tokens_decoder:
            parts = base(name, add_special_tokens=False)["input_ids"]
        else:  # the token itself is split, not its text: a token may hold part of a character, which has no text
            parts = [part.id for part in model.tokenize(name)]
        if not parts:
            raise ModelError(f"the token {name!r} has no tokens in the model's own tokenizer")
        subtokens[number] = parts
    return Extension(extended, subtokens)
