"""How a model is run on batches, chosen and checked before training: its attention, and whether its head can be separated.

In: a model. Out: an `LMLoss`. Main choice: what a model is decides first, then what it computes; no family's name is trusted.
Where layers carry state from token to token, or packed documents do not give what the same documents give one by one, each
document is run as a row of its own. Where head(hidden states) is not the model's own logits, those are used. All is said. A
resumed run takes the choice that it began with, so that no small number can change how it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from steep.core.errors import ModelError, TrainingError
from steep.core.say import Say
from steep.loss import DEFAULT_CHUNK_BYTES
from steep.models import layers
from steep.models.document_attention import document_obstacle, enable_document_attention
from steep.models.lm_loss import LMLoss, read_head
from steep.models.probes import (
    CHECK_LENGTHS,
    check_batch,
    difference,
    full_precision,
    leak,
    look_ahead,
    packing_problem,
)

RECORDED = ("attention", "apart", "has_head")
"""What a run's checkpoints keep of the choice, with what was asked for."""


def prepare_lm_loss(
    model: nn.Module,
    say: Say,
    *,
    attention: str = "auto",
    vocab_size: int | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    document_mask: bool = True,
    recorded: Mapping[str, Any] | None = None,
) -> LMLoss:
    """Choose how `model` is run, checked on a few tokens. `say` is told where that differs from the wish, and why.

    attention: `auto`, `document`, `sdpa` or `eager`. vocab_size: ids that the check may use; default the model's. document_mask:
    whether training keeps documents apart, for what is said. recorded: `recorded_choice` of the run that is continued; taken
    without a check if the same attention is asked for. Call it before compiling layers. Raises ModelError if the attention asked
    for is impossible.
    """
    if recorded and recorded.get("asked") == attention:
        chosen, apart, has_head = (recorded[name] for name in RECORDED)
        _set_chosen(model, chosen)
        return LMLoss(model, chosen, has_head, chunk_bytes, apart)
    chosen, apart = _choose_attention(model, attention, vocab_size, say, document_mask)
    problem = check_decomposition(LMLoss(model, chosen, has_head=True, apart=apart), vocab_size)
    if problem is not None:
        say(f"loss: whole logits of the model's own forward, because {problem}")
    return LMLoss(model, chosen, problem is None, chunk_bytes, apart)


def check_wish(model: nn.Module, wished: str) -> None:
    """Raises ModelError where `document` is asked of a model that by its kind cannot do it; needs no weights."""
    if wished == "document" and (reason := _state_problem(model) or document_obstacle(model)) is not None:
        raise ModelError(f"model.attention=document: {reason}. Use model.attention: auto")


def _state_problem(model: nn.Module) -> str | None:
    state = layers.state_carried(model)
    return None if state is None else f"{type(model).__name__} carries state from token to token ({state})"


def recorded_choice(lm_loss: LMLoss, asked: str) -> dict[str, Any]:
    """How a run computes, for its checkpoints. asked: its model.attention."""
    return {"asked": asked, **{name: getattr(lm_loss, name) for name in RECORDED}}


def leak_test(lm_loss: LMLoss, vocab_size: int | None = None) -> None:
    """Check that no document sees another: no gradient from one to the other, and changing one moves nothing in the others.

    Raises TrainingError if something does. Costs three forward passes and two backward passes over 32 tokens.
    """
    model = lm_loss.model
    batch = check_batch(model, vocab_size)
    first = CHECK_LENGTHS[0]
    ids = batch.input_ids.clone()
    ids[0, :first] = ids[0, :first].flip(0).roll(1)
    changed = replace(batch, input_ids=ids)
    with layers.evaluating(model):
        run = lm_loss.hidden_states if lm_loss.has_head else lm_loss.own_logits
        before, after = run(batch), run(changed)
    moved = difference(after[first:], before[first:])
    gradient = None if lm_loss.apart else leak(lm_loss, vocab_size)
    if moved is None and gradient is None:
        return
    how = f"moved the outputs of another by {moved:.1e} of their size" if moved is not None else (
        f"reaches the outputs of another (gradient {gradient:.1e})"
    )  # fmt: skip
    raise TrainingError(
        f"the leak test failed: changing one document {how}. {type(model).__name__} with attention {lm_loss.attention!r} sees "
        "across documents. Set data.document_mask to false to train that way, or choose another model.attention."
    )


def check_causal(lm_loss: LMLoss, vocab_size: int | None = None) -> None:
    """Raises ModelError for a model whose prediction of a token can see that token or later ones."""
    if (gradient := look_ahead(lm_loss, vocab_size)) is None:
        return
    model = lm_loss.model
    decoder = getattr(layers.text_config(model), "is_decoder", None) is False
    raise ModelError(
        f"{type(model).__name__} sees later tokens when it predicts one (gradient {gradient:.1e}), so it would only learn to "
        "copy them; it is not a causal language model as configured"
        + (". Set is_decoder: true in its configuration" if decoder else "")
    )


def check_decomposition(lm_loss: LMLoss, vocab_size: int | None = None) -> str | None:
    """None if head(hidden states) equals the model's own logits on a few tokens; otherwise what differs, for a message."""
    model = lm_loss.model
    name = type(model).__name__
    try:
        head = read_head(model)
    except ModelError as error:
        return str(error)
    batch = check_batch(model, vocab_size)
    with layers.evaluating(model), full_precision(model):
        own_NV = lm_loss.own_logits(batch)
        has_base = getattr(model, "base_model", model) is not model
        hidden_ND = lm_loss.hidden_states(batch) if has_base else None
        if hidden_ND is None or (own_NV.shape[-1], hidden_ND.shape[-1]) != head.weight.shape:
            return f"the hidden states of {name} do not fit its output layer"
        found = difference(head.logits(hidden_ND), own_NV)
    if found is not None:
        return f"{name}'s logits are not its output layer applied to its hidden states ({found:.1e})"
    return None


# ---- attention ----


def _choose_attention(
    model: nn.Module, wished: str, vocab_size: int | None, say: Say, document_mask: bool
) -> tuple[str, bool]:
    """The attention, and whether documents are run as rows of their own."""
    check_wish(model, wished)
    state = problem = _state_problem(model)
    if problem is None and wished in ("auto", "document"):
        problem = _document_problem(model, vocab_size)
        if problem is None:
            return "document", False
    if wished == "document":
        raise ModelError(f"model.attention=document: {problem}. Use model.attention: auto")
    chosen = _set_attention(model, "sdpa" if wished == "auto" else wished)
    if wished not in ("auto", chosen):
        say(f"attention: {chosen}, because the model offers no {wished}")
    mixed = None if state is not None else _packing_problem(LMLoss(model, chosen, has_head=False), vocab_size)
    if state is None and mixed is None:
        if wished == "auto":
            say(f"attention: {chosen} with restarting position_ids, not document by document: {problem}")
        return chosen, False
    if document_mask:
        say(
            f"documents: each is run as a row of its own, padded to the length of similar ones, because {mixed or problem}. "
            "data.document_mask: false runs whole sequences instead, where each document sees those before it"
        )
    else:
        say(
            "documents: not kept apart in training (data.document_mask: false): "
            f"{'state flows' if state is not None else 'attention reaches'} from one into the next. Held-out documents are "
            "scored each by itself"
        )
    return chosen, True


def _set_chosen(model: nn.Module, attention: str) -> None:
    """Put the model into the state in which an earlier process of this run trained it."""
    if attention == "document":
        enable_document_attention(model)
    elif attention != "own":
        _set_attention(model, attention)


def _set_attention(model: nn.Module, name: str) -> str:
    """Set transformers' implementation. Returns the one now in effect, `own` for a model that has none."""
    part = layers.text_part(model)
    config = getattr(part, "config", None)
    if not hasattr(part, "set_attn_implementation") or not hasattr(config, "_attn_implementation"):
        return "own"
    try:
        part.set_attn_implementation(name)  # type: ignore[operator]
    except ValueError:  # the family has no sdpa
        part.set_attn_implementation("eager")  # type: ignore[operator]
    return str(config._attn_implementation)  # type: ignore[union-attr]


def _document_problem(model: nn.Module, vocab_size: int | None) -> str | None:
    """Enable document attention and compare it with documents run one by one. Returns None, or why it cannot be used."""
    reason = enable_document_attention(model)
    if reason is not None:
        return reason
    try:
        return _packing_problem(LMLoss(model, "document", has_head=False), vocab_size)
    except ModelError as error:
        return str(error)


def _packing_problem(packed: LMLoss, vocab_size: int | None) -> str | None:
    """What packed documents do to each other: in full precision, then with the kernels that train."""
    with full_precision(packed.model):
        problem = packing_problem(packed, vocab_size)
    problem = problem or packing_problem(packed, vocab_size)
    if problem is None and (gradient := leak(packed, vocab_size)) is not None:
        return f"packed documents see each other (gradient {gradient:.1e})"
    return problem
