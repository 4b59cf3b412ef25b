"""What a format of export is, what one export has to do, and the check of ids that formats share.

A format is a file of `formats/`; its name is the file's. The ids of an exported tokenizer are compared with those in training
on strings where tokenizers tend to differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from steep.core.errors import ConfigError, ModelError
from steep.core.plugins import load_plugin
from steep.core.say import Say
from steep.evaluation.generate import end_of_text_ids
from steep.exporters.parity import Answers, Bounds, Parity, Questions, first_difference
from steep.tokenizer.hard_strings import hard_strings

if TYPE_CHECKING:
    from steep.evaluation.loaded_model import LoadedModel

PACKAGE = "steep.exporters.formats"
ALIASES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}
LONGEST_STRING = 20_000
"""Hard strings with more characters are left out: llama.cpp's splitting takes quadratic time on some."""


@dataclass
class Options:
    """What a person may ask of an export."""

    dtype: str | None = None
    quantize: str | None = None
    max_shard_size: int | str = "5GB"
    tokenizer_pre: str | None = None
    verify_with: str | None = None


@dataclass
class ExportTask:
    """One export: the model in fp32, what is asked, and what to compare with. `write` may change the model's weights."""

    loaded: LoadedModel
    options: Options
    dtype: str
    name: str
    card: str
    say: Say
    questions: Questions = field(default_factory=lambda: Questions({}, [], 0))
    trained: Answers = field(default_factory=lambda: Answers("", {}, []))
    """Of the model in fp32, before `write`."""

    @property
    def model(self) -> Any:
        """The transformers model that is exported."""
        return self.loaded.model

    def eos_ids(self) -> list[int]:
        """Every id that ends a text, the tokenizer's own first."""
        own = self.loaded.tokenizer.eos_id
        return sorted(end_of_text_ids(self.model, own), key=lambda number: (number != own, number))


class ExportFormat(Protocol):
    """The members of a file in `formats/`."""

    DTYPES: Mapping[str, Bounds]
    """The dtypes it can be written in, and how far the serving program's answers may differ in each."""
    DEFAULT_DTYPE: str
    """One of DTYPES."""
    ENDINGS: Set[str]
    """Endings (or whole names) of the files that it writes: --overwrite replaces nothing else."""

    def check_task(self, task: ExportTask) -> None:
        """Raise a SteepError, before any work, for what cannot be exported."""

    def write(self, task: ExportTask, folder: Path) -> Answers:
        """Write the files. Returns the trained model's answers in the export's own rounding."""

    def verify(self, task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
        """Ask the programs that will use the files. Raises ModelError with the numbers where they are out of bounds."""


def load_format(name: str) -> ExportFormat:
    """The format of this name. Raises ConfigError with the nearest name for an unknown one."""
    return cast(ExportFormat, load_plugin(PACKAGE, name, what="--to"))


def dtype_name(given: str | None, exporter: ExportFormat, format: str) -> str:
    """The full name of a dtype that a person gave, the format's default for None. Raises ConfigError."""
    if given is None:
        return exporter.DEFAULT_DTYPE
    name = ALIASES.get(given, given)
    if name not in exporter.DTYPES:
        raise ConfigError(f"--to {format} --dtype {given}: use one of {', '.join(exporter.DTYPES)}")
    return name


def refuse(options: Options, format: str, **needed: str) -> None:
    """Raise ConfigError for an option that is set and means nothing to this format. needed: option -> where it belongs."""
    for option, where in needed.items():
        if getattr(options, option) is not None:
            raise ConfigError(f"--to {format} has no --{option.replace('_', '-')}; it belongs to {where}")


def with_strings(task: ExportTask, normal_only: bool) -> Questions:
    """The task's questions with the hard strings. normal_only: only those that Unicode normalization leaves unchanged."""
    normalizer = task.loaded.hf_tokenizer.backend_tokenizer.normalizer
    strings = {name: text for name, text in hard_strings(task.loaded.tokenizer).items() if len(text) <= LONGEST_STRING}
    if normal_only and normalizer is not None and "NF" in repr(normalizer):
        strings = {name: text for name, text in strings.items() if normalizer.normalize_str(text) == text}
    return replace(task.questions, strings=strings)


def check_ids(task: ExportTask, found: Sequence[Answers], questions: Questions) -> None:
    """Raises ModelError if a string gets other ids in the last program asked; differences in the others are only said."""
    tokenizer = task.loaded.hf_tokenizer
    expected = {
        name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in questions.strings.items()
    }
    for answers in found:
        different = first_difference(expected, answers.ids)
        if not different:
            task.say(f"{answers.program}: the ids of {len(expected)} hard strings are equal")
            continue
        name, (at, one, other) = next(iter(different.items()))
        told = (
            f"{answers.program}: {len(different)} of {len(expected)} hard strings get other ids than from the tokenizer: "
            f"{', '.join(different)}. In {name!r} token {at + 1} is {other} and not {one}"
        )
        if answers is found[-1]:
            raise ModelError(f"{told}. Nothing was written.")
        task.say(told)
