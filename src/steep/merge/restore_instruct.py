"""`steep restore-instruct`: trained + scale x (instruct - base), so a base model that was trained further follows instructions.

Source: instruction residuals (see task arithmetic, arXiv 2212.04089). Weakness: the difference was learned for the base model, so
it fits less well the longer the training was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.core.errors import ConfigError, ModelError
from steep.core.public import public
from steep.core.say import Say, tell
from steep.core.units import counted
from steep.evaluation.model_reference import Reference
from steep.merge.verified import write_verified
from steep.merge.weights import FolderWeights, combine, open_weights, require_free
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer


@dataclass(frozen=True)
class RestoreResult:
    """The model written, and the scale of the difference that was added."""

    path: Path
    scale: float

    def __str__(self) -> str:
        return f"trained + {self.scale:g} x (instruct - base), verified by transformers: {self.path}"


@public
def restore_instruct(
    trained: Reference,
    *,
    base: Reference,
    instruct: Reference,
    out: str | os.PathLike[str],
    scale: float = 1.0,
    say: Say = tell,
) -> RestoreResult:
    """Write trained + scale x (instruct - base) with the instruct model's tokenizer and chat template, verified.

    trained, base, instruct: runs, checkpoints or models. out: the folder to write. scale: factor of the difference. say: called
    with each remark. Raises ModelError if names, shapes or the ids of tokens differ.
    """
    folder = require_free(out)
    trained, base, instruct = os.fspath(trained), os.fspath(base), os.fspath(instruct)
    one, two, three = (open_weights(reference, say) for reference in (trained, base, instruct))
    if not isinstance(one, FolderWeights) or not isinstance(three, FolderWeights):
        raise ConfigError(
            "the trained and the instruct model must be folders (or runs): config and tokenizer are taken from them"
        )
    ours, bases, theirs = (load_hf_tokenizer(str(weights.folder)) for weights in (one, two, three))
    if getattr(bases, "chat_template", None):
        say(f"{base} has a chat template: it is a chat model already, so there may be nothing to restore")
    check_vocabularies(ours, bases, "the base", say)
    check_vocabularies(ours, theirs, "the instruct model", say)
    tensors = combine([one, two, three], [1.0, -scale, scale], like=0)
    made = [f"`{trained}`", f"+ {scale:g} x (`{instruct}` - `{base}`)"]
    write_verified(tensors, three.folder, folder, made, config_from=one.folder)
    return RestoreResult(folder, scale)


def check_vocabularies(ours: Any, other: Any, name: str, say: Say) -> None:
    """Raises ModelError unless every token of `ours` has the same id in `other`; what `other` adds is said."""
    mine, its = ours.get_vocab(), other.get_vocab()
    for token, number in mine.items():
        if its.get(token) != number:
            found = its.get(token, "none")
            raise ModelError(f"the token {token!r} has id {number} in the trained model and {found} in {name}")
    added = sorted(its.keys() - mine.keys())
    if not_added := [token for token in added if token not in other.get_added_vocab()]:
        raise ModelError(f"{name} has the token {not_added[0]!r} in its vocabulary, and the trained model does not")
    if added:
        say(f"{name} adds {counted(len(added), 'token')}: {', '.join(added[:8])}")
