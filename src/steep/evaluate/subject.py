"""A finished model to look at: evaluate, generate, export. In: a reference. Out: model, tokenizer and how to run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steep.core.errors import ConfigError, ModelError
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
    from steep.models.load import load_model
    from steep.runtime.device import available_cores, choose_device, choose_precision, parameter_dtype
    from steep.tokenizer.load import load_hf_tokenizer, text_tokenizer

    where = choose_device(device)
    torch.set_num_threads(available_cores())
    how = choose_precision(precision, where.type)
    model = load_model(ModelConfig(pretrained=reference), dtype=parameter_dtype(how), device=where)
    model.eval()
    run = run_of(reference)
    hf_tokenizer = load_hf_tokenizer(reference)
    policy = policy or _policy(run, hf_tokenizer.eos_token_id)
    forward, _ = prepare_forward(model, "auto")
    tokenizer = text_tokenizer(hf_tokenizer, policy, reference)
    return Subject(reference, model, tokenizer, forward, where, how, run)


def run_of(reference: str) -> Path | None:
    """The run directory that a reference is, or lies in; None for any other model."""
    from steep.train.run_directory import is_run_directory

    path = Path(reference)
    if not path.exists():
        return None
    return next((folder for folder in [path, *path.resolve().parents] if is_run_directory(folder)), None)


def config_of_run(run: Path) -> RunConfig:
    """The configuration that a run was made with. Raises ConfigError."""
    from steep.config.load import load_run_config

    return load_run_config(run / "config.yaml")


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


def _policy(run: Path | None, eos_id: int | None) -> TokenizerConfig:
    if run is None:
        return TokenizerConfig(append_eos=eos_id is not None)
    used = config_of_run(run).tokenizer
    return TokenizerConfig(append_eos=used.append_eos, prepend_bos=used.prepend_bos)
