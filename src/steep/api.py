"""steep for notebooks: what the commands do, as functions that take plain values and return plain objects.

Available as `steep.prepare`, `steep.plan`, `steep.train`, `steep.evaluate`, `steep.generate` and `steep.export`.
Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

if TYPE_CHECKING:
    from steep.config.load import ConfigLike
    from steep.evaluation.evaluate_model import Evaluation
    from steep.evaluation.harness import HarnessResult
    from steep.evaluation.loaded_model import ModelReference
    from steep.exporters.result import ExportResult
    from steep.merge.average import AverageResult
    from steep.merge.blend import BlendResult
    from steep.merge.restore_instruct import RestoreResult
    from steep.training.finish import TrainResult
    from steep.training.lr_find import LearningRates

Reference = Union[str, "os.PathLike[str]"]
"""A run, checkpoint, model folder, hub id or .gguf file."""


def lr_find(
    config: ConfigLike, *, rates: Optional[Sequence[float]] = None, steps: int = 20, allow_code: bool = True
) -> LearningRates:
    """Short runs from the base at several learning rates, each scored on the held-out texts, and a proposal.

    rates: default a tenth to ten times the configured one. steps: of each run, of the configured batch size. Writes lr_find.json
    and lr_find.png into `<run directory>/lr_find/`. Raises ConfigError without held-out text, or where no rate helps.
    """
    from steep.config.load import as_config

    checked = as_config(config)

    from steep.runtime.tuning import tune_process

    tune_process()

    from steep.core.say import tell
    from steep.training.lr_find import find_learning_rate

    return find_learning_rate(checked, rates=rates, steps=steps, say=tell, allow_code=allow_code)


def train(
    config: ConfigLike, *, resume: Optional[bool] = None, accept_data_change: bool = False, allow_code: bool = True
) -> TrainResult:
    """Train as configured; continues from the run's newest checkpoint if it has one.

    resume: True demands a checkpoint, False refuses one. accept_data_change: continue with other data than was trained on, from
    its beginning, and record it. allow_code: whether `_target_` may run code outside steep, torch and
    transformers. Raises a SteepError.
    """
    from steep.config.load import as_config

    checked = as_config(config)

    from steep.runtime.tuning import tune_process

    tune_process()

    from steep.training.loop import train as run

    return run(checked, resume=resume, accept_data_change=accept_data_change, allow_code=allow_code)


def evaluate(
    model: Reference,
    texts: Union[Mapping[str, str], Sequence[str], None] = None,
    *,
    against: Optional[Reference] = None,
    tokens: Union[int, str, None] = None,
    batch_size: int = 8,
    sequence_length: Optional[int] = None,
    device: str = "auto",
    precision: str = "auto",
    text_key: Optional[str] = None,
    allow_code: bool = True,
) -> Evaluation:
    """Score a model on texts: nats per token, perplexity, bits per byte.

    model: a run, checkpoint, folder, hub id or .gguf file. texts: paths, or a mapping from names to paths; default: the
    validation texts of the run. against: another model, or `base`: the one that the run started from. tokens: at most so many
    of each text; default the run's, else 200k. sequence_length: default the run's, else 1,024 or what the model can take.
    """
    from steep.evaluation.evaluate_model import evaluate_model

    return evaluate_model(
        os.fspath(model),
        texts,
        against=None if against is None else os.fspath(against),
        tokens=tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        device=device,
        precision=precision,
        text_key=text_key,
        allow_code=allow_code,
    )


def evaluate_tasks(
    model: Reference,
    tasks: Union[str, Sequence[str]],
    *,
    folder: Union[str, os.PathLike[str], None] = None,
    limit: Optional[int] = None,
    against: Optional[Reference] = None,
    batch_size: int = 8,
    device: str = "auto",
    precision: str = "auto",
    allow_code: bool = True,
) -> HarnessResult:
    """Run tasks of lm-eval on a model (extra `eval`).

    model, against: as for `evaluate`. tasks: names, also joined by commas or with `*`. folder: of task files (.yaml), which may
    hold code; without it lm-eval's own tasks, most of which fetch data from the hub. limit: so many documents of each task.
    Raises MissingExtraError without lm-eval, ConfigError for a task that is not there, DataError for data that is not.
    """
    from steep.evaluation.harness import evaluate_on_tasks

    return evaluate_on_tasks(
        os.fspath(model),
        tasks,
        folder=None if folder is None else os.fspath(folder),
        limit=limit,
        against=None if against is None else os.fspath(against),
        batch_size=batch_size,
        device=device,
        precision=precision,
        allow_code=allow_code,
    )


def generate(
    model: Union[Reference, ModelReference],
    prompt: str,
    *,
    max_new_tokens: int = 128,
    device: str = "auto",
    precision: str = "auto",
    seed: Optional[int] = None,
    emit: Callable[[str], None] = lambda text: None,
    allow_code: bool = True,
    **sampling: Any,
) -> str:
    """The continuation of a prompt, without the prompt.

    model: as for `evaluate`, or what `base_model_reference` of `steep.evaluation.loaded_model` gives. emit: called with each new piece of
    text. max_new_tokens: at most so many, and no more than the model's positions leave room for. sampling: options of transformers'
    `generate` (temperature, top_k, top_p, do_sample, ...); without any, greedy.
    """
    from steep.evaluation.generate import generate_text
    from steep.evaluation.loaded_model import ModelReference, model_reference, open_model
    from steep.runtime.device import autocast
    from steep.runtime.seed import seed_everything

    reference = model if isinstance(model, ModelReference) else model_reference(model)
    with open_model(reference, device=device, precision=precision, allow_code=allow_code) as loaded:
        if seed is not None:
            seed_everything(seed)
        with autocast(loaded.runner.device, loaded.runner.precision):
            return generate_text(
                loaded.model, loaded.tokenizer, prompt, max_new_tokens=max_new_tokens, emit=emit, **sampling
            )


def export(
    run: Reference,
    *,
    to: str = "hf",
    out: Union[str, os.PathLike[str], None] = None,
    dtype: Optional[str] = None,
    quantize: Optional[str] = None,
    max_shard_size: Union[int, str] = "5GB",
    tokenizer_pre: Optional[str] = None,
    verify_with: Optional[str] = None,
    overwrite: bool = False,
    allow_code: bool = True,
) -> ExportResult:
    """Write a trained model in the format that another program serves, and verify it with that program.

    run: a run, checkpoint or model. to: `hf`, a folder for transformers and vLLM; `gguf`, a file for llama.cpp; `ollama`, that
    and a Modelfile. out: a folder, default `<run>/export/<to>`. dtype: float32, bfloat16 (default) or float16, and q8_0 for gguf
    and ollama. quantize: nf4, int8 or torchao_int8, for hf. tokenizer_pre: llama.cpp's name of the rule that splits text, where
    it is not found. verify_with: a Python interpreter that has llama-cpp-python. Raises ModelError, with the numbers, if the
    exported model is not the trained one.
    """
    from steep.exporters.run import export_model

    return export_model(
        os.fspath(run),
        to=to,
        out=out,
        dtype=dtype,
        quantize=quantize,
        max_shard_size=max_shard_size,
        tokenizer_pre=tokenizer_pre,
        verify_with=verify_with,
        overwrite=overwrite,
        allow_code=allow_code,
    )


def blend(
    model: Reference,
    texts: Union[Mapping[str, str], Sequence[str], None] = None,
    *,
    base: Optional[Reference] = None,
    alphas: Optional[Sequence[float]] = None,
    cap: Optional[float] = None,
    tokens: Union[int, str, None] = None,
    out: Union[str, os.PathLike[str], None] = None,
) -> BlendResult:
    """Weights between the base and the trained model, each blend scored, the best one under the cap written and verified.

    base: default, what the run started from. alphas: 0 is the base, 1 the trained model, both bit for bit. cap: what each general
    text may lose, as a share of the base's bits per byte; default the run's evaluate.forgetting_cap. Roles are those of the
    forgetting report. texts: default the run's validation texts. out: default `<run>/blend/best`. Raises ModelError for models
    that differ in names or shapes.
    """
    from steep.merge.blend import ALPHAS, blend_models

    return blend_models(
        os.fspath(model),
        base=None if base is None else os.fspath(base),
        alphas=ALPHAS if alphas is None else alphas,
        cap=cap,
        out=None if out is None else os.fspath(out),
        texts=texts,
        tokens=tokens,
    )


def average(
    models: Union[Reference, Sequence[Reference]],
    *,
    last: int = 5,
    weights: str = "uniform",
    texts: Union[Mapping[str, str], Sequence[str], None] = None,
    out: Union[str, os.PathLike[str], None] = None,
    score: bool = True,
) -> AverageResult:
    """The mean of a run's `last` checkpoints, or of several models (oldest first), in fp32, written and verified.

    weights: `uniform`, `ema:0.9`, or `ema` for the moving average that train.ema_decay kept. score: also score it
    beside the newest one. out: default `<run>/average/last_<N>`.
    Raises ConfigError if the run keeps fewer checkpoints, ModelError for models that differ in names or shapes.
    """
    from steep.merge.average import average_models

    named = [models] if isinstance(models, (str, os.PathLike)) else models
    references = [os.fspath(model) for model in named]
    place = None if out is None else os.fspath(out)
    return average_models(references, last=last, weights=weights, out=place, texts=texts, score=score)


def restore_instruct(
    trained: Reference,
    *,
    base: Reference,
    instruct: Reference,
    out: Union[str, os.PathLike[str]],
    scale: float = 1.0,
) -> RestoreResult:
    """Write trained + scale x (instruct - base) with the instruct model's tokenizer and chat template, verified.

    Raises ModelError if names, shapes or the ids of tokens differ.
    """
    from steep.merge.restore_instruct import restore_instruct_model

    three = [os.fspath(reference) for reference in (trained, base, instruct)]
    return restore_instruct_model(three[0], base=three[1], instruct=three[2], out=os.fspath(out), scale=scale)
