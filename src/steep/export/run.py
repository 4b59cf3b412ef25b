"""`steep export`: a trained model in the form that another program serves, verified by loading it there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.core.errors import ConfigError, ModelError
from steep.core.files import TEMPORARY_PREFIX, sync_directory, temporary_path
from steep.core.plugins import load_plugin
from steep.evaluate.subject import Subject, load_subject, origin_of
from steep.export.model_card import model_card
from steep.export.result import ExportResult
from steep.export.verify import TOLERANCE, nats_per_token, verify_export

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

NOT_FORMS = ("model_card", "result", "run", "verify")
VERIFICATION_TEXT = (
    "In the beginning of every verification there is a text that both programs read. It has words, numbers such as "
    "3.14159 and 2,048, code like `for i in range(10): print(i)`, a little français, and a question: is it the same model?"
)


def export_model(
    reference: str,
    *,
    to: str = "hf",
    out: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    allow_code: bool = True,
) -> ExportResult:
    """Export `reference`. See `steep.export`."""
    from steep.models.load import cast_weights

    form: Any = load_plugin("steep.export", to, NOT_FORMS)
    if dtype not in TOLERANCE:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(TOLERANCE)}")
    subject = load_subject(origin_of(reference), device="cpu", precision="fp32", allow_code=allow_code)
    if not hasattr(subject.model, "save_pretrained") or not hasattr(subject.model, "generation_config"):
        raise ModelError(
            f"{reference}: {type(subject.model).__name__} is no transformers model, so there is no hf form of it"
        )
    folder = Path(out) if out is not None else _default_folder(subject, to)
    check_replaceable(folder, overwrite)
    input_ids = verification_ids(subject)
    trained_loss = nats_per_token(logits_of(subject.model, input_ids), input_ids)
    model = cast_weights(subject.model, _torch_dtype(dtype))
    expected_TV = logits_of(model, input_ids)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder)
    for leftover in folder.parent.glob(f"{TEMPORARY_PREFIX}*-{folder.name}"):  # of exports that were killed or refused
        shutil.rmtree(leftover)
    form.write(subject, model, temporary, max_shard_size, model_card(reference, subject.run, dtype))
    found = verify_export(temporary, input_ids, expected_TV, dtype)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    sync_directory(folder.parent)
    return ExportResult(
        path=folder,
        dtype=dtype,
        size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        verified_with=found.program,
        largest_logit_difference=found.largest_logit_difference,
        loss_change=found.nats_per_token - trained_loss,
    )


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raises ConfigError unless `folder` is free, or an earlier export that may be replaced."""
    if not folder.exists():
        return
    if not overwrite:
        raise ConfigError(f"{folder} already exists; choose another --out, or give --overwrite")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ConfigError(f"{folder} is no exported model, so it is not overwritten; choose another --out")
    kinds = {".json", ".safetensors", ".md", ".txt", ".model", ".jinja"}
    others = [path.name for path in folder.iterdir() if path.is_dir() or path.suffix not in kinds]
    if others:
        raise ConfigError(
            f"{folder} holds more than an export ({others[0]}), so it is not overwritten; choose another --out"
        )


def _default_folder(subject: Subject, to: str) -> Path:
    if subject.run is None:
        raise ConfigError(f"{subject.reference} is in no run directory; say where the export goes with --out")
    return subject.run / "export" / to


def verification_ids(subject: Subject) -> list[int]:
    """The ids of the verification text, as many as the model has room for."""
    room = getattr(subject.model.config, "max_position_embeddings", None) or 2048
    return subject.tokenizer.encode(VERIFICATION_TEXT)[:room]


def logits_of(model: torch.nn.Module, input_ids: list[int]) -> NDArray[np.float32]:
    """(tokens, vocabulary) fp32: the model's own logits."""
    import torch

    with torch.no_grad():
        logits_TV: NDArray[np.float32] = (
            model(input_ids=torch.tensor([input_ids]), use_cache=False).logits[0].float().numpy()
        )
        return logits_TV


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
