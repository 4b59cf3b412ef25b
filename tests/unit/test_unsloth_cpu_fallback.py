"""A notebook's questions to the machine: torch's own answers where there is a GPU, this process's where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BatchEncoding

import steep.unsloth
from steep.runtime.device import peak_resident_bytes, total_memory_bytes
from steep.unsloth import cpu_fallback
from steep.unsloth.cpu_fallback import encodings_stay_here, gpu_mem_used

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so torch answers itself")


@no_gpu
def test_the_memory_questions_are_answered_for_this_process() -> None:
    view = steep.unsloth.torch
    assert view.cuda.max_memory_reserved() == peak_resident_bytes()
    assert 0 < view.cuda.memory_allocated() <= 1.05 * view.cuda.max_memory_allocated()  # counted apart
    properties = view.cuda.get_device_properties(0)
    assert properties.total_memory == total_memory_bytes("cpu")
    assert properties.name


@no_gpu
def test_the_figure_follows_what_is_held() -> None:
    before = float(gpu_mem_used().split()[0])
    held = torch.ones(2**29 // 4)  # 512 MiB
    after = float(gpu_mem_used().split()[0])
    assert after - before == pytest.approx(0.5, abs=0.1)
    assert held.numel()


@no_gpu
def test_the_view_is_torch_in_all_else_and_torch_stays_as_it_is() -> None:
    own = torch.cuda.max_memory_reserved
    view = steep.unsloth.torch
    assert view.cuda.max_memory_reserved is not own
    assert torch.cuda.max_memory_reserved is own
    assert view.no_grad is torch.no_grad
    assert view.cuda.is_available() is False
    assert {"Tensor", "cuda"} <= set(dir(view))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = view.no_such_name


@no_gpu
def test_inputs_stay_here_when_they_are_sent_to_a_gpu(
    tiny_tokenizer_directory: Path, tmp_path: Path, capsys: Any
) -> None:
    cpu_fallback._say_once.cache_clear()
    plain = AutoTokenizer.from_pretrained(tiny_tokenizer_directory)
    tokenizer = encodings_stay_here(AutoTokenizer.from_pretrained(tiny_tokenizer_directory))
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    inputs.to("cuda")
    assert inputs["input_ids"].device.type == "cpu"
    assert inputs.to(torch.device("cuda", 0)) is inputs
    assert capsys.readouterr().err.count("leaves them on the CPU") == 1
    assert isinstance(inputs, BatchEncoding)
    assert inputs.to("meta")["input_ids"].device.type == "meta"
    assert tokenizer("abc")["input_ids"] == plain("abc")["input_ids"]
    assert type(plain) is not type(tokenizer), "the class that others use is not touched"
    assert copy.deepcopy(tokenizer)("abc")["input_ids"] == plain("abc")["input_ids"]
    tokenizer.save_pretrained(tmp_path / "one")
    plain.save_pretrained(tmp_path / "two")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()
