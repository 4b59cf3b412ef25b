"""A trained model, loaded for evaluation, export or generation. In: a reference. Out: model, tokenizer and how to run them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steep.checkpoint.load import find_checkpoint, open_checkpoint, verified_reference
from steep.checkpoint.pieces import restore
from steep.core import targets
from steep.core.say import Say, tell
from steep.core.section import Target
from steep.evaluation.model_reference import ModelReference, config_of_run
from steep.models.attention_choice import prepare_lm_loss
from steep.models.experts import use_grouped_experts
from steep.models.layers import vocab_size
from steep.models.load import load_model
from steep.models.load_quantized import load_quantized
from steep.models.reference import ADAPTER_CONFIG, named_base, quantization_of
from steep.models.runner import ModelRunner
from steep.runtime.device import choose_device, default_threads, keep_torch_settings
from steep.runtime.precision import autocast, choose_precision, parameter_dtype
from steep.tokenizer.encode import TextTokenizer
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.open import text_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be scored or to generate text."""

    reference: str
    runner: ModelRunner
    tokenizer: TextTokenizer
    hf_tokenizer: Any
    """The same tokenizer, as an object of transformers."""
    run: Path | None
    """The directory of the run that made it, if it is known."""
    folder: str | None = None
    """The folder or file that its weights were loaded from; None for a model that a `_target_` built."""

    @property
    def model(self) -> torch.nn.Module:
        """The language model itself."""
        return self.runner.model


@contextmanager
def open_model(
    reference: ModelReference,
    *,
    device: str = "auto",
    precision: str = "auto",
    allow_code: bool | None = None,
    say: Say = tell,
) -> Iterator[LoadedModel]:
    """A loaded model for the length of a `with` block. Raises ModelError, ConfigError, CheckpointError.

    Inside the block torch uses OMP_NUM_THREADS threads, by default all available cores, and the model's device. Afterwards the
    process has its own thread count and CUDA device again. Of a run the newest complete checkpoint is loaded, every byte
    verified; `say` is told of those skipped, and of what an `auto` precision chose. allow_code: whether the code that a run's
    `_target_` names may run; None: where training on this machine has run it.
    """
    with keep_torch_settings():
        yield _load(reference, device, precision, allow_code, say)


def _load(reference: ModelReference, device: str, precision: str, allow_code: bool | None, say: Say) -> LoadedModel:
    where = choose_device(device)
    torch.set_num_threads(default_threads())
    how = choose_precision(precision, where.type, say=say)
    if isinstance(reference.model, Target):
        folder = None
        config_file = None if reference.run is None else reference.run / "config.yaml"
        allowed = targets.code_is_allowed(reference.model, config_file, allow_code)
        targets.announce(reference.model, say)
        targets.check(reference.model, allow_code=allowed, location="model")
        checkpoint = find_checkpoint(reference.reference, say)
        model = load_model(reference.model, dtype=parameter_dtype(how), device=where, allow_code=allowed)
        restore(model, None, open_checkpoint(checkpoint))
        tokenizer_folder = str(reference.tokenizer.pretrained)
    else:
        folder = verified_reference(str(reference.model.pretrained), say)
        note_adapter_merge(Path(folder), reference.run, say)
        config = reference.model.model_copy(update={"pretrained": folder})
        if (quantization := quantization_of(folder)) is not None:
            say(
                f"{folder} is quantized ({quantization.get('quant_method')}): it is used as it is, and cannot be trained"
            )
            model = load_quantized(folder, where)
        else:
            model = load_model(config, dtype=parameter_dtype(how), device=where)
        own = reference.tokenizer.pretrained in (None, reference.model.pretrained)
        tokenizer_folder = folder if own else str(reference.tokenizer.pretrained)
    model.eval()
    hf_tokenizer = load_hf_tokenizer(tokenizer_folder, getattr(reference.model, "revision", None), say)
    policy = reference.tokenizer
    if reference.run is None and hf_tokenizer.eos_token_id is None:
        policy = policy.model_copy(update={"append_eos": False})
    tokenizer = text_tokenizer(hf_tokenizer, policy, reference.reference)
    use_grouped_experts(model)  # as in training
    with autocast(where, how):
        lm_loss = prepare_lm_loss(model, say, vocab_size=vocab_size(model) or tokenizer.vocab_size)
    runner = ModelRunner(lm_loss, where, how)
    return LoadedModel(reference.reference, runner, tokenizer, hf_tokenizer, reference.run, folder)


def note_adapter_merge(folder: Path, run: Path | None, say: Say) -> None:
    """Say what the adapter in `folder` loses when it is added to its base's weights; nothing for a model without an adapter.

    An adapter that was trained on quantized weights also corrects their rounding, which the unquantized base does not have.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    base, _ = named_base(folder)
    method = getattr(config_of_run(run).model, "quantize", None) if run is not None else None
    if method is not None:
        say(
            f"the adapter was trained on {base} in {method}; it is merged into the unquantized weights, so scores differ "
            "slightly from those in training"
        )
    if base.endswith(".gguf"):
        say(
            f"the adapter is merged into the weights of {base}, dequantized: what quantization lost is not restored. To serve "
            "the unquantized model, train on that"
        )
