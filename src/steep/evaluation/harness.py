"""`steep evaluate --harness`: tasks of lm-eval on a model. In: a reference and task names. Out: lm-eval's results.

The model is loaded as for every other evaluation, with its run's weights, tokenizer and precision, and passed to lm-eval
unchanged; steep downloads nothing. Tasks come from a folder of task files (`--harness-path`), or from lm-eval's own list, most of
which fetch their data from the hub. Task files may contain code (`!function`, jinja templates), so `--no-code` refuses a folder
of them. Weakness: only transformers models run; relative paths in a task file start at the working directory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import filter as filter_names
from pathlib import Path
from typing import Any

from steep.core.errors import ConfigError, DataError, MissingExtraError, ModelError
from steep.core.hub import SWITCHED_OFF, hub_silence
from steep.core.public import Readable, public
from steep.core.say import Say, tell
from steep.evaluation.loaded_model import LoadedModel, open_model
from steep.evaluation.model_reference import Reference, base_model_reference, model_reference
from steep.runtime.precision import AUTOCAST_DTYPES

KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
"""The parts of lm-eval's results that are kept; the rest describes the machine."""


@dataclass(frozen=True, repr=False)
class HarnessResult(Readable):
    """What lm-eval measured of one or two models."""

    model: str
    results: dict[str, Any]
    """lm-eval's own mapping: `results[task]["acc,none"]` and so on."""
    version: str
    """Of lm-eval."""
    limit: int | None = None
    """Documents per task; None for all."""
    against: str | None = None
    against_results: dict[str, Any] | None = None

    def to_mapping(self) -> dict[str, Any]:
        """The results as JSON values."""
        mapping: dict[str, Any] = {
            "model": self.model, "lm_eval": self.version, "limit": self.limit, **self.results,
        }  # fmt: skip
        if self.against_results is not None:
            mapping |= {"against": self.against, "against_results": self.against_results["results"]}
        return mapping

    def to_text(self) -> str:
        """lm-eval's own table of each model."""
        tables = [_table(self.model, self.results)]
        if self.against is not None and self.against_results is not None:
            tables.append(_table(self.against, self.against_results))
        limited = f", the first {self.limit} documents of each task" if self.limit is not None else ""
        return "\n".join([f"lm-eval {self.version}{limited}", *tables])


def _table(model: str, results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join([model, *(table.rstrip() for table in tables)])


@public
def evaluate_tasks(
    model: Reference,
    tasks: str | Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    against: Reference | None = None,
    batch_size: int = 8,
    device: str = "auto",
    precision: str = "auto",
    allow_code: bool | None = None,
    say: Say = tell,
) -> HarnessResult:
    """Run tasks of lm-eval on a model (extra `eval`).

    model, against, batch_size, device, precision, allow_code, say: as for `steep.evaluate`. tasks: names, also joined by commas
    or with `*`. folder: of task files (.yaml), which may contain code; without it lm-eval's own tasks, most of which fetch data
    from the hub. limit: documents of each task; default all. Raises MissingExtraError without lm-eval, ConfigError for an unknown
    task, DataError for missing data.
    """
    model = os.fspath(model)
    manager, names = find_tasks(tasks, folder, allow_code, say)
    other = None if against is None else base_model_reference(model) if against == "base" else model_reference(against)
    answers = []
    for reference in [model_reference(model), *([other] if other is not None else [])]:
        with open_model(reference, device=device, precision=precision, allow_code=allow_code, say=say) as loaded:
            answers.append(_run(loaded, manager, names, limit, batch_size))
            precision = loaded.runner.precision  # chosen once, and said once
        del loaded  # one model in memory at a time
    return HarnessResult(
        model,
        answers[0],
        importlib.metadata.version("lm-eval"),
        limit,
        against=other.reference if other is not None else None,
        against_results=answers[1] if other is not None else None,
    )


def find_tasks(
    tasks: str | Sequence[str], folder: str | os.PathLike[str] | None, allow_code: bool | None, say: Say
) -> tuple[Any, list[str]]:
    """lm-eval's TaskManager and the names of the tasks, `*` expanded. Its own list is read only if the folder lacks a task.

    Raises MissingExtraError without lm-eval, and ConfigError for a task that neither has.
    """
    for module, package in (("lm_eval", "lm-eval"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "eval", "steep evaluate --harness")
    from lm_eval.tasks import TaskManager

    wanted = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not wanted:
        raise ConfigError("--harness: name at least one task")
    path = None if folder is None else Path(folder).expanduser()
    if path is not None:
        if not path.is_dir():
            raise ConfigError(f"--harness-path {path}: is not a folder; give one with task files (.yaml) of lm-eval")
        if allow_code is False:
            raise ConfigError(f"--harness-path {path}: task files may contain code, and --no-code refuses it")
        say(f"tasks are read from {path}; task files may run code")
        manager = TaskManager(include_path=str(path), include_defaults=False)
        if not _unknown(wanted, manager):
            return manager, _expand(wanted, manager)
    if (silence := hub_silence()) and silence != SWITCHED_OFF:  # `datasets` would try for more than a minute
        raise DataError(
            f"lm-eval's own tasks fetch their data from the hub, and {silence}. If the data has been fetched before, set "
            "HF_HUB_OFFLINE=1 to read it from the cache; a task file of your own in --harness-path can name local files."
        )
    say("reading lm-eval's own list of tasks, which takes about 20 s")
    manager = TaskManager(include_path=None if path is None else str(path))
    if unknown := _unknown(wanted, manager):
        near = get_close_matches(unknown[0], manager.all_tasks)
        hint = f" Similar: {', '.join(near)}." if near else ""
        raise ConfigError(
            f"--harness: lm-eval has no task {', '.join(unknown)}.{hint} Name a folder of your own task files "
            "with --harness-path; `lm-eval ls tasks` lists those that come with lm-eval."
        )
    return manager, _expand(wanted, manager)


def _unknown(wanted: Sequence[str], manager: Any) -> list[str]:
    return [name for name in wanted if not filter_names(manager.all_tasks, name)]


def _expand(wanted: Sequence[str], manager: Any) -> list[str]:
    """The names, each wildcard replaced by the tasks that match."""
    return list(dict.fromkeys(task for name in wanted for task in filter_names(manager.all_tasks, name)))


def _run(loaded: LoadedModel, manager: Any, names: list[str], limit: int | None, batch_size: int) -> dict[str, Any]:
    """lm-eval's answer for one model. Raises DataError where the data of a task is not available."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

    if not isinstance(loaded.model, PreTrainedModel):
        raise ModelError(
            f"{loaded.reference} is a {type(loaded.model).__name__}, and lm-eval runs transformers models only. "
            "Export it with `steep export` to a folder for transformers, and evaluate that."
        )
    wrapped = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.hf_tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=AUTOCAST_DTYPES.get(loaded.runner.precision),
    )
    try:
        answer = simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, limit=limit, batch_size=batch_size, log_samples=False
        )
    except OSError as error:  # what datasets and the hub's client raise for missing data
        raise DataError(
            f"lm-eval cannot read the data of {', '.join(names)}: {error}. Most of its tasks fetch their data from the hub; a "
            "task file of your own in --harness-path can name local files."
        ) from error
    return {key: answer[key] for key in KEPT if key in answer}
