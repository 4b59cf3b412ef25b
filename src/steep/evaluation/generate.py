"""A prompt continued by a model, streamed token by token. In: a model, a tokenizer, a prompt. Out: the continuation.

Models with transformers' `generate` use it, with all its sampling options. Any other model that maps input ids to logits is
sampled here without a key-value cache, which costs a full forward pass per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from steep.core.errors import ConfigError, ModelError
from steep.core.public import public, refuse_unknown
from steep.evaluation.loaded_model import open_model
from steep.evaluation.model_reference import ModelReference, Reference, model_reference
from steep.models.layers import compute_device, evaluating, max_positions
from steep.runtime.precision import autocast
from steep.runtime.seed import seed_everything
from steep.tokenizer.encode import TextTokenizer


class TextStream:
    """Ids in, text out as soon as it is final: a character is held back until all its bytes have arrived."""

    def __init__(self, decode: Callable[[Sequence[int]], str], emit: Callable[[str], None]):
        self._decode, self._emit = decode, emit
        self._ids: list[int] = []
        self._shown = 0
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take ids. transformers passes the prompt in the first call, which is ignored."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.add(value.reshape(-1).tolist())

    def add(self, ids: Iterable[int]) -> None:
        """Take new ids and emit the text that is now final."""
        self._ids.extend(ids)
        text = self._decode(self._ids)
        final = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if len(final) > self._shown:
            self._emit(final[self._shown :])
            self._shown = len(final)

    def end(self) -> None:
        """Emit the rest."""
        text = self._decode(self._ids)
        if len(text) > self._shown:
            self._emit(text[self._shown :])


@public
def generate(
    model: Reference | ModelReference, prompt: str, *, max_new_tokens: int = 128, do_sample: bool | None = None,
    temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
    repetition_penalty: float | None = None, seed: int | None = None, device: str = "auto", precision: str = "auto",
    emit: Callable[[str], None] = lambda text: None, allow_code: bool | None = None, **sampling: Any,
) -> str:  # fmt: skip
    """The continuation of a prompt, without the prompt.

    model: as for `steep.evaluate`, or a reference from `base_model_reference` of `steep.evaluation.model_reference`.
    max_new_tokens: an upper limit; the model's positions may leave room for fewer. do_sample: sample, or take the likeliest
    token; default: sample if temperature (above 0), top_k or top_p is given. repetition_penalty: above 1, repeat less. sampling:
    other options of transformers' `generate`. seed: makes sampling repeatable. device, precision, allow_code: as for
    `steep.evaluate`. emit: called with each new piece of text.
    """
    named = inspect.signature(generate).parameters
    refuse_unknown("generate", sampling, [*(name for name in named if name != "sampling"), *_transformers_options()])
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    reference = model if isinstance(model, ModelReference) else model_reference(model)
    with open_model(reference, device=device, precision=precision, allow_code=allow_code) as loaded:
        if seed is not None:
            seed_everything(seed)
        with autocast(loaded.runner.device, loaded.runner.precision):
            return generate_text(
                loaded.model,
                loaded.tokenizer,
                prompt,
                max_new_tokens=max_new_tokens,
                emit=emit,
                **sampling_options(do_sample, **options),
                **sampling,
            )


def sampling_options(
    do_sample: bool | None = None, *, temperature: float | None = None, **others: float | None
) -> dict[str, Any]:
    """Options for transformers' `generate`. Temperature 0 is greedy, and so is a call without temperature, top_k and top_p.
    Raises ConfigError for options that contradict each other."""
    options: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    if temperature == 0:
        if do_sample:
            raise ConfigError("do_sample is true and temperature is 0, which is greedy; give a temperature above 0")
        return {**options, "do_sample": False}
    if temperature is not None:
        options["temperature"] = temperature
    samples = any(name in options for name in ("temperature", "top_k", "top_p"))
    return {**options, "do_sample": samples if do_sample is None else do_sample}


def _transformers_options() -> set[str]:
    from transformers import GenerationConfig, GenerationMixin

    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    return parameters | {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def generate_text(
    model: Any,
    tokenizer: TextTokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    emit: Callable[[str], None] = lambda text: None,
    **sampling: Any,
) -> str:
    """The continuation of `prompt`, without the prompt and without the end-of-text token.

    prompt: text, or ids that are taken as they are, such as those of a chat template.
    max_new_tokens: an upper limit; the model's positions may leave room for fewer.
    sampling: options of transformers' `generate` (do_sample, temperature, top_k, top_p, repetition_penalty, ...); a model without
    that method takes only those named here. Raises ModelError for a prompt that fills the model's positions.
    emit: called with each new piece of text. The model's training mode is restored afterwards.
    """
    ids = list(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    if isinstance(prompt, str) and tokenizer.prepend_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if not ids:  # a model needs at least one token
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ids = [start if start is not None else 0]
    room = max_positions(model)
    if room is not None and len(ids) >= room:
        raise ModelError(f"the prompt has {len(ids):,} tokens and the model {room:,} positions; shorten the prompt")
    if room is not None:
        max_new_tokens = min(max_new_tokens, room - len(ids))
    eos_ids = end_of_text_ids(model, tokenizer.eos_id)
    device = compute_device(model)
    input_ids = torch.tensor([ids], device=device)
    stream = TextStream(lambda new: tokenizer.decode([i for i in new if i not in eos_ids]), emit)
    with evaluating(model):
        if hasattr(model, "generate"):
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(eos_ids) or None,
                pad_token_id=min(eos_ids, default=0),
                streamer=stream,
                use_cache=True,
                **{"do_sample": False, **sampling},
            )
            new_ids = output[0, len(ids) :].tolist()
        else:
            new_ids = _generate_without_cache(model, input_ids, max_new_tokens, eos_ids, stream, **sampling)
    return tokenizer.decode([i for i in new_ids if i not in eos_ids])


def end_of_text_ids(model: torch.nn.Module, tokenizer_eos_id: int | None) -> set[int]:
    """Every id that ends a text: the tokenizer's, and those of the model's generation_config."""
    ids = set() if tokenizer_eos_id is None else {tokenizer_eos_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ids |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return ids


def _generate_without_cache(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    eos_ids: set[int],
    stream: TextStream,
    *,
    do_sample: bool = False,
    **sampling: Any,
) -> list[int]:
    """Greedy or sampled continuation, a full forward pass per token."""
    processors = _processors(**sampling)
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens:
        output = model(input_ids)
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        scores_1V = processors(input_ids, logits[:, -1].float())
        token = int(torch.multinomial(scores_1V.softmax(-1), 1)) if do_sample else int(scores_1V.argmax())
        new_ids.append(token)
        if token in eos_ids:
            break
        stream.add([token])
        input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=1)
    stream.end()
    return new_ids


def _processors(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Any:
    """transformers' own logits processors, in the order in which its `generate` applies them."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chosen = [
        RepetitionPenaltyLogitsProcessor(repetition_penalty) if repetition_penalty is not None else None,
        TemperatureLogitsWarper(temperature) if temperature != 1.0 else None,
        TopKLogitsWarper(top_k) if top_k is not None else None,
        TopPLogitsWarper(top_p) if top_p is not None else None,
    ]
    return LogitsProcessorList([processor for processor in chosen if processor is not None])
