"""A finished model to look at: evaluate, generate, export. In: a reference. Out: model, tokenizer and how to run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steep.core.errors import ConfigError, ModelError
from steep.core.section import Target
from steep.models.config import ModelConfig
from steep.tokenizer.config import TokenizerConfig

if TYPE_CHECKING:
    import torch

    from steep.batch import Batch
    from steep.config.run import RunConfig
    from steep.models.forward import ModelForward
    from steep.tokenizer.encode import TextTokenizer


@dataclass(frozen=True)
class Subject:
    """A model that is ready to be scored or to write."""

    reference: str
    model: torch.nn.Module
    tokenizer: TextTokenizer
    forward: ModelForward
    device: torch.device
    precision: str
    run: Path | None
    """The directory of the run that made it, if it is known."""

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """(B*T,) fp32 losses of a batch, without gradients."""
        import torch

        from steep.models.forward import forward_token_losses
        from steep.runtime.device import autocast

        with torch.no_grad(), autocast(self.device, self.precision):
            return forward_token_losses(self.forward, batch.to(self.device))


def load_subject(
    reference: str, *, device: str = "auto", precision: str = "auto", policy: TokenizerConfig | None = None
) -> Subject:
    """Load a run, checkpoint, model folder, hub id or .gguf file for use. Raises ModelError, ConfigError, CheckpointError.

    policy: what the tokenizer puts around a document; default as the run's, else EOS where there is one.
    """
    import torch

    from steep.models.forward import prepare_forward
    from steep.models.load import describe_model, load_model
    from steep.runtime.device import available_cores, choose_device, choose_precision, parameter_dtype
    from steep.tokenizer.load import load_hf_tokenizer, text_tokenizer, tokenizer_reference

    where = choose_device(device)
    torch.set_num_threads(available_cores())
    how = choose_precision(precision, where.type)
    run = run_of(reference)
    config = config_of_run(run) if run is not None else None
    if config is not None and isinstance(config.model, Target) and not _is_consolidated(reference):
        model = _load_target(reference, config, parameter_dtype(how), where)
        hf_tokenizer = load_hf_tokenizer(tokenizer_reference(config.tokenizer, config.model))
    else:
        model = load_model(ModelConfig(pretrained=reference), dtype=parameter_dtype(how), device=where)
        hf_tokenizer = load_hf_tokenizer(reference)
    model.eval()
    policy = policy or _policy(config, hf_tokenizer.eos_token_id)
    tokenizer = text_tokenizer(hf_tokenizer, policy, reference)
    forward, _ = prepare_forward(model, "auto", describe_model(model)["vocab_size"] or tokenizer.vocab_size)
    return Subject(reference, model, tokenizer, forward, where, how, run)


def _is_consolidated(reference: str) -> bool:
    """Whether the newest checkpoint holds a folder that transformers loads."""
    from steep.models.load import resolve_reference

    try:
        return resolve_reference(reference) is not None
    except ModelError:
        return False


def _load_target(reference: str, config: RunConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A model that only its `_target_` can build, with the weights of the newest checkpoint."""
    from steep.checkpoint.capture import restore
    from steep.checkpoint.load import find_checkpoint, open_checkpoint
    from steep.models.load import load_model

    model = load_model(config.model, dtype=dtype, device=device)
    checkpoint, _ = find_checkpoint(reference)
    restore(model, None, open_checkpoint(checkpoint))
    return model


def run_of(reference: str) -> Path | None:
    """The run directory that a reference is, or lies in; None for any other model."""
    from steep.train.run_directory import is_run_directory

    path = Path(reference)
    if not path.exists():
        return None
    return next((folder for folder in [path, *path.resolve().parents] if is_run_directory(folder)), None)


def config_of_run(run: Path) -> RunConfig:
    """The configuration that a run was made with; its data need not be there any more. Raises ConfigError."""
    from pydantic import ValidationError

    from steep.config.run import RunConfig
    from steep.config.yaml_file import parse_yaml

    path = run / "config.yaml"
    try:
        return RunConfig.model_validate(parse_yaml(path.read_text(encoding="utf-8")).data)
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path} is no configuration of this version of steep: {error}") from None


def base_of(reference: str) -> str:
    """The model that a run started from. Raises ConfigError where there is none, or none to compare with."""
    run = run_of(reference)
    if run is None:
        raise ConfigError(
            f"--against base: {reference} is not in a run directory, so its base is not known; name a model"
        )
    model = config_of_run(run).model
    if getattr(model, "pretrained", None) is None:
        raise ModelError(f"--against base: the run {run} started from fresh weights; name a model to compare with")
    return str(model.pretrained)


def _policy(config: RunConfig | None, eos_id: int | None) -> TokenizerConfig:
    if config is None:
        return TokenizerConfig(append_eos=eos_id is not None)
    used = config.tokenizer
    return TokenizerConfig(append_eos=used.append_eos, prepend_bos=used.prepend_bos)
