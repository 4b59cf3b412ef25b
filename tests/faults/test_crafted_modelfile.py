"""What a stranger's tokenizer and generation_config.json say stays one value of a Modelfile, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steep.core.errors import ModelError
from steep.exporters.modelfile import modelfile
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer

Make = Callable[..., str]


@pytest.fixture
def made(tiny_tokenizer_directory: Path) -> Make:
    """The Modelfile of a tokenizer whose end of text is `end`."""

    def make(end: str = "</s>", **generation: Any) -> str:
        tokenizer = load_hf_tokenizer(str(tiny_tokenizer_directory))
        tokenizer.add_special_tokens({"eos_token": end})
        return modelfile("w.gguf", tokenizer, generation, [tokenizer.eos_token_id], 2048, lambda line: None)

    return make


def test_ordinary_values_are_written_as_numbers(made: Make) -> None:
    lines = made(temperature=1, top_p=0.9, top_k=40).splitlines()
    assert lines[0] == "FROM ./w.gguf"
    assert {'PARAMETER stop "</s>"', "PARAMETER temperature 1", "PARAMETER top_p 0.9", "PARAMETER top_k 40"} <= set(
        lines
    )
    assert sum(line.startswith("FROM") for line in lines) == 1


@pytest.mark.parametrize("value", ["1\nFROM /etc/passwd", "1", [1], {"a": 1}, True, float("nan"), float("inf")])
def test_a_sampling_setting_that_is_no_number_is_refused(value: Any, made: Make) -> None:
    with pytest.raises(ModelError, match="sets temperature to .* a number is needed"):
        made(temperature=value)


@pytest.mark.parametrize("end", ['x"\nFROM /etc/passwd', "x\nADAPTER ./a", 'a"b', "tab\t"])
def test_an_end_of_text_that_would_begin_a_line_is_refused(end: str, made: Make) -> None:
    with pytest.raises(ModelError, match="a Modelfile cannot hold it"):
        made(end)
