"""Checks that no section can make alone: combinations of sections, and the files that the configuration names.

Each check is a function from the configuration to problems; add one by writing it and naming it in CROSS_CHECKS or
DISK_CHECKS. Checks must be cheap (a few file-system calls) and must not import torch.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from steep.config.errors import Problem, shown
from steep.config.keys import Location
from steep.config.run import RunConfig
from steep.core.listing import may_be_seen, unlistable_folder
from steep.core.plugins import plugin_names
from steep.core.section import SELF_GENERATED, Target

_REMOTE = re.compile(r"[a-z0-9]{2,}://", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# --- between sections -----------------------------------------------------------------------------------------------


def warmup_fits(config: RunConfig) -> Iterator[Problem]:
    """The warmup must end before the run does."""
    warmup, steps = config.schedule.warmup_steps, config.train.steps
    if warmup is not None and steps is not None and warmup >= steps:
        yield Problem(
            ("schedule", "warmup_steps"),
            f"{warmup} is not below train.steps = {steps}: the learning rate would never reach its peak; "
            f"{max(1, steps // 100)} (1 %) to {max(1, steps // 10)} (10 %) is usual",
        )


def samples_have_prompts(config: RunConfig) -> Iterator[Problem]:
    """Samples need something to continue."""
    if config.evaluate.sample_every_steps is not None and not config.evaluate.prompts:
        yield Problem(
            ("evaluate", "sample_every_steps"),
            "there are no evaluate.prompts to continue; add some, as in prompts: ['The manual says']",
        )


def evaluation_has_text(config: RunConfig) -> Iterator[Problem]:
    """Scoring every n steps needs a held-out text."""
    given = "every_steps" if config.evaluate.every_steps is not None else "every_ratio"
    if getattr(config.evaluate, given) is not None and not config.data.validation:
        yield Problem(
            ("evaluate", given),
            "there is no text to score; name one, as in data.validation: {domain: {share: 0.01}} "
            "(holds out a hundredth of the training documents) or {domain: {path: held_out.jsonl}}",
        )


def epochs_are_a_length(config: RunConfig) -> Iterator[Problem]:
    """An epoch is not a length where source weights change during the run or the size of a source is unknown."""
    if config.train.steps is not None or config.train.tokens is not None:
        return
    if config.data.phases:
        yield Problem(
            ("data", "phases"),
            "a run with phases needs its length in train.tokens or train.steps; an epoch depends on the weights",
        )
    for position, source in enumerate(config.data.train):
        if source.stream:
            yield Problem(
                ("data", "train", position, "stream"),
                "a run that streams needs its length in train.tokens or train.steps; the size of a stream is not known",
            )


def adapter_fits(config: RunConfig) -> Iterator[Problem]:
    """An adapter freezes the model under it, and quantized weights need one."""
    model = config.model
    if isinstance(model, Target):
        return
    if model.quantize is not None and config.adapter is None:
        yield Problem(
            ("model", "quantize"),
            f"{model.quantize} weights cannot be trained; add an adapter, as in adapter: {{rank: 16}}, or remove quantize",
        )
    if config.adapter is not None and config.adapter.type == "dora" and model.quantize in ("int8", "torchao_int8"):
        yield Problem(
            ("adapter", "type"),
            f"dora needs the norms of the weights, which peft cannot compute for {model.quantize} weights; use type lora, or nf4",
        )
    if config.adapter is not None and model.freeze is not None:
        yield Problem(
            ("model", "freeze"),
            "an adapter freezes the whole model already; remove freeze, and choose what is adapted with adapter.targets",
        )
    if config.adapter is not None and model.pretrained is None:
        yield Problem(
            ("adapter",),
            "an adapter on fresh weights learns nothing useful, since the weights under it are random; give model.pretrained",
        )


def new_tokens_are_trained(config: RunConfig) -> Iterator[Problem]:
    """New tokens belong to pretrained weights, and their embeddings must be trained."""
    model = config.model
    if config.vocabulary is None:
        return
    if isinstance(model, Target) or model.pretrained is None:
        yield Problem(
            ("vocabulary",),
            "adds tokens to pretrained weights; a model with fresh weights uses its tokenizer unchanged (tokenizer.pretrained)",
        )
    elif model.freeze is not None and model.freeze.embeddings:
        yield Problem(
            ("model", "freeze"),
            "freezes the embeddings, but those of new tokens must be trained; do not freeze embeddings",
        )
    elif config.tokenizer.pretrained is not None:
        yield Problem(
            ("tokenizer", "pretrained"),
            "new tokens are added to the model's own tokenizer; remove this key, or give a folder made from it as vocabulary.add",
        )


def steps_can_be_skipped(config: RunConfig) -> Iterator[Problem]:
    """Schedule-free optimizers change the weights between gradient and update, so an update cannot be skipped."""
    name = getattr(config.optimizer, "name", None)
    if config.train.on_spike == "skip" and name == "schedule_free_adamw":
        yield Problem(("train", "on_spike"), "schedule_free_adamw cannot skip an update; use rollback, or continue")


def device_is_known(config: RunConfig) -> Iterator[Problem]:
    """`gpu`, `cuda0` and the like are not names of torch devices."""
    device = config.train.device
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", device):
        digits = re.search(r"\d+$", device)
        guess = f"cuda:{digits[0]}" if digits else "cuda"
        hint = f"; did you mean {guess!r}?" if re.match(r"gpu|cuda|nvidia|\d", device.lower()) else "."
        yield Problem(("train", "device"), f"{shown(device)} is not a device{hint} It can be: auto, cpu, cuda, cuda:1")


def self_generated_has_a_writer(config: RunConfig) -> Iterator[Problem]:
    """Path `auto` is text that the pretrained model writes before the run; it needs the native order."""
    sources: list[tuple[Location, Any]] = [
        (("data", "train", position, "path"), source) for position, source in enumerate(config.data.train)
    ]
    sources += [(("data", "validation", name, "path"), text) for name, text in config.data.validation.items()]
    for location, source in sources:
        if source.path != SELF_GENERATED:
            continue
        if isinstance(config.model, Target) or config.model.pretrained is None:
            yield Problem(
                location, "auto is text that the base model writes, and fresh weights cannot write any; name a text"
            )
        if config.data.order == "megatron":
            yield Problem(location, "auto needs order: native; the megatron order reads token files")
        if location[1] == "train" and (source.role != "replay" or source.stream):
            yield Problem(
                location,
                "auto is text that the base model writes, as replay, before the first step: give it role: replay, and no stream; "
                "a file or folder of that name is ./auto",
            )


def source_names_differ(config: RunConfig) -> Iterator[Problem]:
    """Reports tell sources apart by name."""
    named = Counter(source.name for source in config.data.train if source.name is not None)
    for position, source in enumerate(config.data.train):
        if source.name is not None and named[source.name] > 1:
            message = f"{named[source.name]} sources are called {source.name!r}"
            yield Problem(("data", "train", position, "name"), message)


def plugins_exist(config: RunConfig) -> Iterator[Problem]:
    """An optimizer or tracker is a file in its folder with a function `build`."""
    named: list[tuple[str, Location, Any]] = [("steep.optim.optimizers", ("optimizer", "name"), config.optimizer)]
    for position, tracker in enumerate(config.trackers):
        named.append(("steep.trackers.backends", ("trackers", position, "name"), tracker))
    for package, location, plugin in named:
        if isinstance(plugin, Target) or plugin.name in (names := plugin_names(package)):
            continue
        near = get_close_matches(plugin.name.lower(), names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        there = f"There are: {', '.join(names)}. Any other can be named with _target_"
        yield Problem(location, f"there is no {plugin.name!r}{hint} {there}")


CROSS_CHECKS: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    warmup_fits,
    samples_have_prompts,
    evaluation_has_text,
    epochs_are_a_length,
    adapter_fits,
    new_tokens_are_trained,
    steps_can_be_skipped,
    device_is_known,
    self_generated_has_a_writer,
    source_names_differ,
    plugins_exist,
)


# --- on disk (from the plain data: what is wrong elsewhere must not hide these) ---------------------------------------


def data_paths_exist(data: Any) -> Iterator[Problem]:
    """Every path of a training or validation source leads to something."""
    section = data.get("data") if isinstance(data, dict) else None
    if not isinstance(section, dict):
        return
    train, validation = section.get("train"), section.get("validation")
    sources: list[tuple[Location, Any]] = []
    if isinstance(train, list):
        sources += [(("data", "train", position), source) for position, source in enumerate(train)]
    if isinstance(validation, dict):
        sources += [(("data", "validation", name), source) for name, source in validation.items()]
    for location, source in sources:
        path = source.get("path") if isinstance(source, dict) else None
        if path == SELF_GENERATED:
            continue
        if isinstance(path, str):
            yield from _leads_somewhere(path, (*location, "path"))
        for position, item in enumerate(path if isinstance(path, list) else []):
            if isinstance(item, str):
                yield from _leads_somewhere(item, (*location, "path", position))


def _leads_somewhere(path: str, location: Location) -> Iterator[Problem]:
    if _REMOTE.match(path):
        yield Problem(location, f"{shown(path)} is remote; steep reads local files: download it and give its path")
        return
    if path.startswith("hub:"):  # a dataset: whether it exists shows when it is read
        return
    expanded = os.path.expanduser(path)
    if os.path.exists(expanded) or os.path.exists(expanded + ".bin") or os.path.exists(expanded + ".idx"):
        return
    if glob.has_magic(expanded):
        nothing = next(glob.iglob(expanded, recursive=True), None) is None
        if nothing and unlistable_folder(expanded) is None:
            yield Problem(location, f"{path!r} matches no file{_what_is_there(expanded)}")
        return
    if not may_be_seen(expanded):  # of what is there and cannot be read, its reader says why
        yield Problem(location, f"{path!r} does not exist{nearest_path(expanded)}")


def _what_is_there(pattern: str) -> str:
    """What the folder before the first wildcard holds, by kind of file."""
    parts = Path(pattern).parts
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    if not fixed.is_dir():
        return f": there is no folder {str(fixed)!r}{nearest_path(str(fixed))}"
    names = _entries(fixed)
    kinds = Counter(Path(name).suffix or "entries without a suffix" for name in names)
    if not kinds:
        return f": the folder {str(fixed)!r} is empty"
    holds = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(4))
    return f"; {str(fixed)!r} holds {holds}, for example {min(names)!r}"


def nearest_path(path: str) -> str:
    """The second half of 'does not exist': the nearest name that does, or the folder from which it is missing."""
    wanted = Path(path)
    parent = wanted.parent
    while not parent.is_dir() and parent != parent.parent:
        wanted, parent = parent, parent.parent
    near = get_close_matches(wanted.name, _entries(parent), n=1, cutoff=0.6)
    if near:
        rest = Path(path).parts[len(wanted.parts) :]
        return f"; did you mean {str(parent / near[0] / Path(*rest)) if rest else str(parent / near[0])!r}?"
    if "$" in path:
        return "; environment variables are not expanded in a configuration"
    if str(parent) == ".":
        return f" in the current directory {os.getcwd()}"
    return f"; there is no {wanted.name!r} in {str(parent)!r}" if wanted != Path(path) else ""


def _entries(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, 20_000)]
    except PermissionError:
        return []


def model_files_exist(data: Any) -> Iterator[Problem]:
    """A model or tokenizer that is written as a path exists; anything else has the form of a hub id.

    Not asked of a run that has a checkpoint, which goes on from its own files; what it lacks is said when it is resumed.
    """
    if _has_checkpoint(data):
        return
    for location in (("model", "pretrained"), ("model", "config"), ("tokenizer", "pretrained")):
        section = data.get(location[0]) if isinstance(data, dict) else None
        reference = section.get(location[1]) if isinstance(section, dict) and "_target_" not in section else None
        if not isinstance(reference, str) or os.path.exists(expanded := os.path.expanduser(reference)):
            continue
        if reference.startswith((".", "/", "~")) or reference.lower().endswith((".gguf", ".json", ".safetensors")):
            yield Problem(location, f"{reference!r} does not exist{nearest_path(expanded)}")
        elif not _HUB_ID.fullmatch(reference):
            yield Problem(
                location,
                f"{shown(reference)} is neither a path that exists{nearest_path(expanded)} "
                "nor a hub id such as HuggingFaceTB/SmolLM2-135M",
            )


def _has_checkpoint(data: Any) -> bool:
    run = data.get("run") if isinstance(data, dict) else None
    name, directory = (run.get("name"), run.get("directory", "runs")) if isinstance(run, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(directory, str):
        return False
    return os.path.isfile(os.path.join(os.path.expanduser(directory), name, "checkpoints", "LATEST"))


def target_files_exist(data: Any) -> Iterator[Problem]:
    """The file of `_target_: ./file.py:object` exists."""
    for location, written in _target_texts(data, ()):
        file, colon, _ = written.rpartition(":")
        expanded = os.path.expanduser(file)
        if colon and file.endswith(".py") and not os.path.isfile(expanded):
            yield Problem((*location, "_target_"), f"the file {file!r} does not exist{nearest_path(expanded)}")


def _target_texts(value: Any, location: Location) -> Iterator[tuple[Location, str]]:
    if isinstance(value, dict):
        if isinstance(value.get("_target_"), str):
            yield location, value["_target_"]
        for key, item in value.items():
            yield from _target_texts(item, (*location, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _target_texts(item, (*location, position))


DISK_CHECKS: tuple[Callable[[Any], Iterator[Problem]], ...] = (data_paths_exist, model_files_exist, target_files_exist)
