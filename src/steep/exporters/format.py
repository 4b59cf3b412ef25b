"""What a form of export is: a file of this folder whose name is the form's, with these members.

DTYPES: dict[str, ...]    the dtypes it can be written in, by the names of `dtype_name`
DEFAULT_DTYPE: str
ENDINGS: set[str]         endings of the files that it writes: nothing else is replaced by --overwrite
check_job(job)            raises before any work for what cannot be exported
write(job, folder)        writes the files; returns the trained model's answers in the export's own rounding
verify(job, folder, expected)   asks the program that will use the files; returns the numbers, raises ModelError beyond bounds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steep.core.errors import ConfigError
from steep.exporters.parity import Answers, Questions

if TYPE_CHECKING:
    from steep.evaluation.loaded_model import LoadedModel

ALIASES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}


@dataclass
class Options:
    """What a person may ask of an export."""

    dtype: str | None = None
    quantize: str | None = None
    max_shard_size: int | str = "5GB"
    tokenizer_pre: str | None = None
    verify_with: str | None = None


@dataclass
class ExportJob:
    """One export: the model in fp32, what is asked, and what to compare with. `write` may change the model's weights."""

    loaded: LoadedModel
    options: Options
    dtype: str
    name: str
    card: str
    say: Callable[[str], None]
    questions: Questions = field(default_factory=lambda: Questions({}, [], 0))
    trained: Answers = field(default_factory=lambda: Answers("", {}, []))
    """Of the model in fp32, before `write`."""

    @property
    def model(self) -> Any:
        """The loaded's transformers model."""
        return self.loaded.model

    def eos_ids(self) -> list[int]:
        """Every id that ends a text, the tokenizer's own first."""
        from steep.evaluation.generate import end_of_text_ids

        own = self.loaded.tokenizer.eos_id
        return sorted(end_of_text_ids(self.model, own), key=lambda number: (number != own, number))


def dtype_name(given: str | None, form: Any, form_name: str) -> str:
    """The form's name of a dtype that a person gave, its default for None. Raises ConfigError."""
    if given is None:
        return str(form.DEFAULT_DTYPE)
    name = ALIASES.get(given, given)
    if name not in form.DTYPES:
        raise ConfigError(f"--to {form_name} --dtype {given}: use one of {', '.join(form.DTYPES)}")
    return name


def refuse(options: Options, form_name: str, **needed: str) -> None:
    """Raise ConfigError for an option that is set and means nothing to this form. needed: option -> where it belongs."""
    for option, where in needed.items():
        if getattr(options, option) is not None:
            raise ConfigError(f"--to {form_name} has no --{option.replace('_', '-')}; it belongs to {where}")
