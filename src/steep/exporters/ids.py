"""Whether an exported tokenizer gives the ids of the one in training, on strings that tokenizers differ on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steep.core.errors import ModelError
from steep.exporters.format import ExportTask
from steep.exporters.parity import Answers, Questions, first_difference

LONGEST_STRING = 20_000
"""Characters of a hard string beyond which it is not asked: llama.cpp's splitting takes quadratic time on some."""


def with_strings(task: ExportTask, normal_only: bool) -> Questions:
    """The task's questions and the hard strings. normal_only: only those that the tokenizer's Unicode form leaves as they are."""
    from steep.tokenizer.hard_strings import hard_strings

    normalizer = task.loaded.hf_tokenizer.backend_tokenizer.normalizer
    strings = {name: text for name, text in hard_strings(task.loaded.tokenizer).items() if len(text) <= LONGEST_STRING}
    if normal_only and normalizer is not None and "NF" in repr(normalizer):
        strings = {name: text for name, text in strings.items() if normalizer.normalize_str(text) == text}
    return replace(task.questions, strings=strings)


def check_ids(task: ExportTask, found: Sequence[Answers], questions: Questions) -> None:
    """The last program asked decides, and the others are told of. Raises ModelError if a string gets other ids there."""
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
            f"{answers.program}: {len(different)} of {len(expected)} hard strings get other ids than the tokenizer gives: "
            f"{', '.join(different)}. In {name!r} token {at + 1} is {other} and not {one}"
        )
        if answers is found[-1]:
            raise ModelError(f"{told}. The files are kept until the next export; do not serve them.")
        task.say(told)
