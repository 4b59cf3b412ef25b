"""Export for llama.cpp and programs built on it: one .gguf file with weights, sizes and tokenizer.

Tensors are written one at a time: each is rounded, written, and put back into the model as the file holds it, so the model in
memory becomes the reference for the file. The file is read back twice: by transformers' reader of .gguf files, which dequantizes
it and must give almost exactly the same logits, and by llama.cpp, with bounds that allow for its rounding of activations.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import ConfigError, ModelError
from steep.core.files import write_text
from steep.core.gguf_metadata import require_gguf
from steep.core.units import counted
from steep.exporters.format import ExportTask, check_ids, refuse, with_strings
from steep.exporters.gguf_families import context_length, family_of
from steep.exporters.gguf_model import Tensor, config_mapping, tensors_of, write_keys
from steep.exporters.gguf_tokenizer import describe_tokenizer, say_differences, write_tokenizer
from steep.exporters.parity import Answers, Bounds, Parity, answer, check, compare
from steep.exporters.verify import ask_llama_cpp, ask_transformers

DTYPES = {
    "float32": Bounds(1e-2, 1e-4, 1e-3, "llama.cpp tabulates or approximates some functions, gelu in fp16"),
    "float16": Bounds(3e-2, 1e-3, 5e-3, "llama.cpp rounds the activations to fp16 too"),
    "bfloat16": Bounds(1e-1, 2e-2, 2e-2, "llama.cpp rounds the activations to bf16 too, 8 bits of every number"),
    "q8_0": Bounds(
        5e-1, 1e-2, 2e-2, "8 bits per weight, with a scale per 32, and llama.cpp rounds the activations in the same way"
    ),
}
"""Bounds for llama.cpp: 3 to 10 times what was measured on SmolLM2-135M and on tiny random models of every family."""

MIXTURE_SHARE = 0.9
"""Of the positions of a mixture of experts that llama.cpp's bounds must hold for. On tiny random ones, whose routers are often
near a tie, up to 0.8 % of the positions took another expert."""

READER_BOUNDS = {
    "float32": Bounds(1e-4, 1e-6, 1e-5, "the same numbers in the same kernels"),
    "float16": Bounds(1e-4, 1e-3, 5e-3, "the same numbers in the same kernels"),
    "bfloat16": Bounds(1e-4, 2e-2, 2e-2, "the same numbers in the same kernels"),
    "q8_0": Bounds(1e-4, 2e-2, 3e-2, "the same numbers, dequantized, in the same kernels"),
}
"""Bounds for transformers' reading of the file, in fp32: only the order of sums may differ."""

DEFAULT_DTYPE = "bfloat16"
ENDINGS = {".gguf", ".md"}
PYTHON_VARIABLE = "STEEP_LLAMA_CPP_PYTHON"
"""Environment variable that names an interpreter with llama-cpp-python, like --verify-with."""
PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
BLOCK = 32
"""Numbers that share a scale in q8_0; a tensor whose row length is not a multiple of it is written in fp16."""
FLOAT16_MAX = float(np.finfo(np.float16).max)


def check_task(task: ExportTask) -> None:
    """Raises ConfigError, ModelError, MissingExtraError for what this format cannot do, before any work."""
    refuse(task.options, "gguf", quantize="--to hf (for gguf, --dtype q8_0 quantizes)")
    require_gguf("writing a .gguf file")
    family = family_of(task.model.config)
    positions, context = task.model.config.max_position_embeddings, context_length(task.model.config, family)
    if context < positions:
        task.say(
            f"the file's context is {context:,} tokens, not {positions:,}: llama.cpp's {family.architecture} has no sliding "
            "window, and up to its length there is no difference"
        )
    describe_tokenizer(task.loaded.hf_tokenizer, task.model.config.vocab_size, task.options.tokenizer_pre)
    say_differences(task.loaded.hf_tokenizer, task.say)
    if llama_cpp_python(task.options.verify_with) is None and not family.has_reader:
        raise ConfigError(
            f"a gguf file of {task.model.config.model_type} can be verified only by llama.cpp, which was not found: pip install "
            f"llama-cpp-python (in any environment), and give its interpreter as --verify-with or {PYTHON_VARIABLE}"
        )


def llama_cpp_python(given: str | None) -> str | None:
    """The interpreter with llama.cpp: the one given, the one in STEEP_LLAMA_CPP_PYTHON, or this one; None if there is none.

    Raises ConfigError if a named one does not exist.
    """
    named = given or os.environ.get(PYTHON_VARIABLE)
    if named:
        found = shutil.which(named)
        if found is None:
            raise ConfigError(
                f"{named} (--verify-with, {PYTHON_VARIABLE}): there is no such program; name a Python interpreter that has "
                "llama-cpp-python"
            )
        return found
    return sys.executable if importlib.util.find_spec("llama_cpp") is not None else None


def write(task: ExportTask, folder: Path) -> Answers:
    """Write the file. Returns the answers of the model with every weight as the file holds it, computed in fp32."""
    folder.mkdir(parents=True)
    write_gguf(task, folder / f"{task.name}-{task.dtype}.gguf")
    write_text(folder / "README.md", task.card)
    return answer(task.model, task.questions, "trained")


def write_gguf(task: ExportTask, path: Path) -> None:
    """The file itself; `task.model` then holds the rounded weights."""
    from gguf import GGUFWriter

    model, hf_tokenizer = task.model, task.loaded.hf_tokenizer
    family = family_of(model.config)
    writer = GGUFWriter(path, family.architecture)
    eos_ids = task.eos_ids()
    found = describe_tokenizer(hf_tokenizer, model.config.vocab_size, task.options.tokenizer_pre)
    name = general_name(task.name, found.tokens)
    write_keys(writer, model.config, family, name, task.dtype, config_mapping(model.config, eos_ids))
    write_tokenizer(writer, found, hf_tokenizer, eos_ids, task.loaded.tokenizer.prepend_bos)
    tensors = [(tensor, _kind(tensor, task.dtype)) for tensor in tensors_of(model, family)]
    odd = [tensor.name for tensor, kind in tensors if task.dtype == "q8_0" and kind == "float16"]
    if odd:
        task.say(
            f"written in fp16, not q8_0: {counted(len(odd), 'tensor')} whose row length is not a multiple of {BLOCK}, "
            f"such as {odd[0]}"
        )
    for tensor, kind in tensors:
        _announce(writer, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in tensors:
        packed = pack(tensor.read(), kind, tensor.name)
        writer.write_tensor_data(packed)
        tensor.write_back(unpack(packed, kind))
    writer.close()


def general_name(name: str, tokens: list[str]) -> str:
    """The model's name in the file.

    llama.cpp looks for the tokens of Phi-3 where a name has "phi3" or "phi-3" in it, and does not load a file without them; such
    a name is spelled otherwise.
    """
    if set(PHI3_TOKENS) <= set(tokens):
        return name
    return re.sub("phi(-?)3", r"phi \g<1>3", name, flags=re.IGNORECASE)


def _kind(tensor: Tensor, dtype: str) -> str:
    if tensor.keeps_fp32:
        return "float32"
    return "float16" if dtype == "q8_0" and tensor.shape[-1] % BLOCK else dtype


def _ggml_type(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[kind]]


def _announce(writer: Any, tensor: Tensor, kind: str) -> None:
    from gguf.quants import quant_shape_to_byte_shape

    plain, kind_number = kind in ("float32", "float16"), _ggml_type(kind)
    number = np.dtype(kind if plain else np.uint8)
    shape = tensor.shape if plain else quant_shape_to_byte_shape(tensor.shape, kind_number)
    size = int(np.prod(shape)) * number.itemsize
    writer.add_tensor_info(tensor.name, shape, number, size, raw_dtype=kind_number)


def pack(values: NDArray[np.float32], kind: str, name: str) -> NDArray[Any]:
    """Numbers as the file holds them. Raises ModelError for one that fp16 cannot represent."""
    from gguf.quants import quantize

    if kind == "float32":
        return values
    if kind == "float16" and float(np.abs(values).max()) > FLOAT16_MAX:
        raise ModelError(f"{name} holds {np.abs(values).max():.3g}, beyond fp16's {FLOAT16_MAX:.0f}; use --dtype bf16")
    return values.astype(np.float16) if kind == "float16" else quantize(values, _ggml_type(kind))


def unpack(packed: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """The numbers that a program reads from the file."""
    from gguf.quants import dequantize

    return packed.astype(np.float32) if kind in ("float32", "float16") else dequantize(packed, _ggml_type(kind))


# ---- verification ----


def verify(task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
    """Compare the file as transformers' reader and llama.cpp see it. Raises ModelError, with the numbers, if they differ."""
    [path] = folder.glob("*.gguf")
    questions = with_strings(task, normal_only=True)
    family = family_of(task.model.config)
    found = []
    if family.has_reader:
        found.append((ask_transformers("gguf", path, questions), READER_BOUNDS[task.dtype]))
    python = llama_cpp_python(task.options.verify_with)
    if python is not None:
        bounds = DTYPES[task.dtype]
        if family.renormalizes is not None:  # a mixture of experts
            bounds = replace(bounds, share=MIXTURE_SHARE)
        found.append((ask_llama_cpp(python, path, questions), bounds))
    else:
        task.say(
            "llama.cpp was not found, so only transformers has read the file. To compare llama.cpp itself: "
            f"pip install llama-cpp-python (in any environment), and give its interpreter as --verify-with or {PYTHON_VARIABLE}"
        )
    verified = []
    for answers, bounds in found:
        parity = compare(task.trained, expected, answers, questions.texts)
        check(parity, expected, bounds, answers.greedy, f"the export {path}")
        verified.append(parity)
    check_ids(task, [answers for answers, _ in found], questions)
    return verified
