"""Whether an exported tokenizer gives the same ids as the one in training, on strings where tokenizers tend to differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steep.core.errors import ModelError
from steep.exporters.format import ExportTask
from steep.exporters.parity import Answers, Questions, first_difference
from steep.tokenizer.hard_strings import hard_strings

LONGEST_STRING = 20_000
"""Hard strings with more characters are left out: llama.cpp's splitting takes quadratic time on some."""


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
            raise ModelError(f"{told}. The files are kept until the next export; do not serve them.")
        task.say(told)
