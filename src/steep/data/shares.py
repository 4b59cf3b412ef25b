"""The share of a run's sources that is held out. In: the data section and stores. Out: what is trained on, and held-out texts."""

from __future__ import annotations

import numpy as np

from steep.core.errors import DataError
from steep.core.say import Say
from steep.core.units import counted
from steep.data.held_out_text import HeldOutText
from steep.data.hold_out import HeldOut, HoldOut
from steep.order.config import DataConfig, ValidationConfig
from steep.order.data_order import held_out
from steep.store.cut_store import CutStore
from steep.store.reader import TokenStore


def share_holder(config: DataConfig, validation: ValidationConfig) -> float | HoldOut:
    """How a share is held out: of the tokens of each source, or, a number, of all documents by their hashes alone."""
    assert validation.share is not None
    if validation.share_of == "documents":
        return validation.share
    return HoldOut(validation.share, blocks=not config.align_to_bos)  # with it, sequences begin where documents do


def hold_out(
    store: TokenStore, name: str, holder: float | HoldOut, say: Say
) -> tuple[TokenStore, np.ndarray, np.ndarray, str]:
    """The store with what it is cut into, the documents of it that are trained on, those held out, and the name of the choice."""
    if not isinstance(holder, HoldOut):
        out = held_out(store.content_hashes, holder)
        return store, np.flatnonzero(~out), np.flatnonzero(out), ""
    found = holder.take(store.content_hashes, store.document_lengths)
    if line := _says(name, store, found):
        say(line)
    training = np.ones(store.num_documents, dtype=bool)
    training[found.documents] = training[found.blocks[:, 0]] = False
    if not len(found.blocks):
        return store, np.flatnonzero(training), found.documents, found.fingerprint
    first_block = store.num_documents + len(found.rests)
    rests, blocks = np.arange(store.num_documents, first_block), first_block + np.arange(len(found.blocks))
    cut = CutStore(store, np.concatenate([found.rests, found.blocks]))
    return (
        cut,
        np.concatenate([np.flatnonzero(training), rests]),
        np.concatenate([found.documents, blocks]),
        found.fingerprint,
    )


def _says(name: str, store: TokenStore, found: HeldOut) -> str:
    """What is held out of a source, in words; empty for nothing."""
    in_documents, in_blocks = int(store.document_lengths[found.documents].sum()), int(found.blocks[:, 2].sum())
    what = []
    if len(found.documents):
        what.append(f"{len(found.documents):,} of {store.num_documents:,} documents")
    if len(found.blocks):
        cut = counted(len(np.unique(found.blocks[:, 0])), "long document")
        about = round(in_blocks / len(found.blocks))
        blocks = f"{counted(len(found.blocks), 'block')} of {about:,} tokens"
        what.append(f"{blocks} from {cut}, whose other parts are trained on")
    if not what:
        return ""
    share = (in_documents + in_blocks) / store.num_tokens
    return f"{name}: held out {in_documents + in_blocks:,} tokens ({share:.1%}): {' and '.join(what)}"


def shared_texts(
    config: DataConfig, shared: str, names: list[str], held: list[tuple[int, TokenStore, np.ndarray]]
) -> list[HeldOutText]:
    """The held-out texts of a share: one for each source that holds something out. Raises DataError if none does."""
    validation = config.validation[shared]
    held = [(number, store, out) for number, store, out in held if int(store.document_lengths[out].sum()) > 1]
    if not held:
        raise DataError(
            f"data.validation.{shared}: a share of {validation.share} of the training text holds out nothing that could be "
            "scored. Give a larger share, or a path with held-out documents."
            + ("" if validation.share_of == "tokens" else " share_of: tokens also takes blocks of long documents.")
        )
    if validation.share_of == "documents":
        return [HeldOutText(shared, [(store, out) for _, store, out in held], role=validation.role)]
    texts = []
    for number, store, out in held:
        own = shared if len(config.train) == 1 else names[number]
        name = f"{shared} {own}" if own in config.validation and own != shared else own
        role = "general" if config.train[number].role == "replay" else validation.role
        texts.append(HeldOutText(name, [(store, out)], role=role))
    return texts
