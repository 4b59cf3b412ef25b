"""`steep average`: the mean of a run's last checkpoints, or of any models of one architecture.

Sources: LAWA (arXiv 2306.03241), PMA (2505.12082): averaging late checkpoints does much of what decay does. Weakness: checkpoints
that lie far apart (another learning rate, another basin) average to a worse model; the scores printed beside say so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steep.checkpoint.load import find_checkpoint, open_checkpoint
from steep.checkpoint.retention import complete_checkpoints
from steep.core.errors import ConfigError
from steep.core.public import public
from steep.core.say import Say, tell
from steep.evaluation.evaluate_model import Evaluation, evaluate
from steep.evaluation.model_reference import Reference, run_of
from steep.merge.verified import write_verified
from steep.merge.weights import FolderWeights, MergedAdapter, combine, open_weights, require_free
from steep.models.adapters import adapter_name
from steep.optim.ema import KEY


@dataclass(frozen=True)
class AverageResult:
    """The model written, its parts with their shares, and its scores beside the newest one's."""

    path: Path
    parts: dict[str, float]
    evaluation: Evaluation | None

    def __str__(self) -> str:
        parts = [f"{share:.4f} x {name}" for name, share in self.parts.items()]
        scores = [self.evaluation.to_text()] if self.evaluation else []
        return "\n".join([f"average of {len(parts)} models, verified by transformers: {self.path}", *parts, *scores])


@public
def average(
    models: Reference | Sequence[Reference],
    *,
    last: int = 5,
    weights: str = "uniform",
    texts: Mapping[str, str] | Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    score: bool = True,
    say: Say = tell,
) -> AverageResult:
    """The mean of a run's `last` checkpoints, or of several models (oldest first), in fp32, written and verified.

    models: a run, or the models. weights: `uniform`, `ema:0.9`, or `ema` for the moving average that train.ema_decay kept. score:
    also score it beside the newest one, on `texts`, as for `steep.evaluate`. out: default `<run>/average/last_<N>`. say: called
    with each remark. Raises ConfigError if the run keeps fewer checkpoints, ModelError for models that differ in names or shapes.
    """
    references = [os.fspath(model) for model in ([models] if isinstance(models, (str, os.PathLike)) else models)]
    if weights == "ema":
        return _running_average(references, out, texts, score, say)
    parts = list(references) if len(references) > 1 else last_checkpoints(references[0], last)
    shares = shares_of(weights, len(parts))
    run = run_of(parts[-1])
    if out is None and run is None:
        raise ConfigError("these models are not in a run directory; name the folder for the average with --out")
    folder = require_free(out if out is not None else f"{run}/average/last_{len(parts)}")
    opened = [open_weights(part, say) for part in parts]
    newest = opened[-1]
    if not isinstance(newest, FolderWeights):
        raise ConfigError(f"{parts[-1]}: config and tokenizer are taken from the last model, so it must be a folder")
    tensors = combine(opened, shares)
    made = dict(zip(parts, shares, strict=True))
    if len(made) < len(parts):
        raise ConfigError(f"a model is named twice: {', '.join(parts)}")
    write_verified(tensors, newest.folder, folder, [f"{share:.6g} x `{name}`" for name, share in made.items()])
    if score and not texts and run_of(folder) is None:
        say("not scored: the average is not in a run directory, and no text was named")
        score = False
    return AverageResult(folder, made, evaluate(str(folder), texts, against=parts[-1], say=say) if score else None)


def _running_average(
    references: Sequence[str],
    out: str | os.PathLike[str] | None,
    texts: Mapping[str, str] | Sequence[str] | None,
    score: bool,
    say: Say,
) -> AverageResult:
    """The moving average that a run kept in training (train.ema_decay), from its newest checkpoint."""
    if len(references) > 1 or (run := run_of(references[0])) is None:
        raise ConfigError("--weights ema takes one run: the moving average is in its newest checkpoint")
    path = find_checkpoint(references[0], say)
    saved = open_checkpoint(path).optimizer_tensors()
    averages = {name.removesuffix(f".{KEY}"): tensor for name, tensor in saved.items() if name.endswith(f".{KEY}")}
    if not averages:
        raise ConfigError(
            f"{path.name} has no moving average; train with train.ema_decay, such as 0.999, or average checkpoints with "
            "--weights ema:0.9"
        )
    folder = require_free(out if out is not None else f"{run}/average/ema")
    of_adapter = {adapter_name(name): tensor for name, tensor in averages.items()}
    newest = open_weights(str(path), say, adapter_tensors=of_adapter)
    if not isinstance(newest, FolderWeights):
        raise ConfigError(f"{path} has no model folder")
    own = {} if isinstance(newest, MergedAdapter) else averages
    tensors = {name: own[name].to(tensor.dtype) if name in own else tensor for name, tensor in newest.items()}
    write_verified(tensors, newest.folder, folder, [f"moving average of the weights in training, at `{path.name}`"])
    evaluation = evaluate(str(folder), texts, against=str(path), say=say) if score else None
    return AverageResult(folder, {f"the moving average at {path.name}": 1.0}, evaluation)


def last_checkpoints(run: str, last: int) -> list[str]:
    """The paths of a run's newest complete checkpoints, oldest first, one per step. Raises ConfigError if there are fewer."""
    if last < 2:
        raise ConfigError(f"--last {last}: an average needs at least 2 checkpoints")
    by_step = {kept.manifest.step: kept.path for kept in reversed(complete_checkpoints(Path(run) / "checkpoints"))}
    if len(by_step) < last:
        steps = ", ".join(map(str, sorted(by_step))) or "none"
        raise ConfigError(
            f"{run} keeps {len(by_step)} complete checkpoints (steps: {steps}), and --last asks for {last}. Ask for fewer, or "
            f"train with checkpoint.keep_last: {last} or more and a smaller checkpoint.every_steps"
        )
    return [str(by_step[step]) for step in sorted(by_step)[-last:]]


def shares_of(weights: str, count: int) -> list[float]:
    """Shares that add up to 1, oldest first: equal, or those of an exponential moving average. Raises ConfigError.

    ema with decay d over n models: d**(n-1) for the oldest, then (1 - d) d**(n-1-i) for model i = 1 .. n-1.
    """
    if weights == "uniform":
        return [1 / count] * count
    kind, _, text = weights.partition(":")
    try:
        decay = float(text) if kind == "ema" else -1.0
    except ValueError:
        decay = -1.0
    if not 0 < decay < 1:
        raise ConfigError(
            f"--weights {weights}: use uniform, or ema:DECAY with a decay between 0 and 1, such as ema:0.9"
        )
    later = [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    return [decay ** (count - 1), *later]
