"""Questions to an exported model in a new process, with the program that will use it. In: files, questions. Out: its answers.

`python -m steep.exporters.verify KIND RESULT.npz` runs there with transformers alone: KIND is `hf` (a folder), `adapter` (peft's,
loaded with peft) or `gguf` (a file, read by transformers' own reader, independent of ours, which writes). llama.cpp runs in
`llama_cpp_process.py`, in any interpreter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from steep.core.child import python_command
from steep.core.errors import ModelError
from steep.exporters.parity import Answers, Questions, answer

LLAMA_CPP_PROCESS = Path(__file__).with_name("llama_cpp_process.py")
SAME_IN_BOTH = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                "rms_norm_eps", "layer_norm_epsilon", "tie_word_embeddings")  # fmt: skip
"""What llama.cpp's keys must say as the configuration in the file does."""


def ask_transformers(kind: str, path: Path, questions: Questions) -> Answers:
    """transformers' answers about a folder (`hf`, `adapter`) or .gguf file (`gguf`), in a new process. Raises ModelError."""
    return _ask(python_command("steep.exporters.verify", kind), path, questions)


def ask_llama_cpp(python: str, path: Path, questions: Questions) -> Answers:
    """llama.cpp's answers about a .gguf file. python: an interpreter that has llama-cpp-python. Raises ModelError."""
    return _ask([python, str(LLAMA_CPP_PROCESS)], path, questions)


def _ask(command: list[str], path: Path, questions: Questions) -> Answers:
    asked = {**asdict(questions), "path": str(path)}
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "answers.npz"
        done = subprocess.run([*command, str(result)], input=json.dumps(asked), capture_output=True, text=True)
        if done.returncode != 0 or not result.is_file():
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ModelError(f"the export {path} does not load in a new process ({Path(command[0]).name}): {reason}")
        with np.load(result, allow_pickle=False) as arrays:
            logits = {name.removeprefix("text:"): arrays[name] for name in arrays if name.startswith("text:")}
            ids = {name.removeprefix("ids:"): arrays[name].tolist() for name in arrays if name.startswith("ids:")}
            return Answers(done.stdout.strip().splitlines()[-1], logits, arrays["greedy"].tolist(), ids=ids)


def _main(kind: str, result: str) -> None:
    """The other process: transformers alone."""
    import transformers

    asked = json.load(sys.stdin)
    path = Path(asked.pop("path"))
    questions = Questions(**asked)
    model, tokenizer = {"hf": _load_folder, "gguf": _load_gguf, "adapter": _load_adapter}[kind](path)
    model.eval()
    found = answer(model, questions)
    arrays: dict[str, Any] = {f"text:{name}": logits for name, logits in found.logits.items()}
    arrays["greedy"] = np.array(found.greedy, dtype=np.int64)
    for name, text in questions.strings.items():
        arrays[f"ids:{name}"] = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    np.savez(result, **arrays)
    reader = " (its reader of .gguf files)" if kind == "gguf" else ""
    if kind == "adapter":
        import peft

        reader = f" with peft {peft.__version__}"
    print(f"transformers {transformers.__version__}{reader}")


def _load_folder(path: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    from steep.models.composite import auto_class  # transformers alone loads and runs the model

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    model = auto_class(config).from_pretrained(path, dtype="auto", local_files_only=True)
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def _load_adapter(path: Path) -> tuple[Any, Any]:
    """The base as steep loads it (peft cannot load a .gguf base), with the adapter loaded by peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from steep.models.load import load_adapter_base  # a folder is verified by transformers alone

    base: Any = load_adapter_base(path, torch.float32)
    return PeftModel.from_pretrained(base, str(path)), AutoTokenizer.from_pretrained(path, local_files_only=True)


def _load_gguf(path: Path) -> tuple[Any, Any]:
    """The file's tensors, dequantized to fp32, in the model whose configuration the file carries; and its tokenizer.

    What transformers reads from llama.cpp's keys must agree with that configuration, or llama.cpp would build another model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # a folder is verified by transformers alone
    from steep.models.hf_config import read_gguf_config
    from steep.tokenizer.hf_tokenizer import load_hf_tokenizer

    config = read_gguf_config(path)
    derived = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    for name in SAME_IN_BOTH:
        one, other = getattr(config, name, None), getattr(derived, name, None)
        if one is not None and other is not None and not np.isclose(float(one), float(other), rtol=1e-6):
            raise ModelError(f"the file gives {name} {other!r} to llama.cpp, and the model has {one!r}")
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, config=config, dtype=torch.float32
    )
    return model, load_hf_tokenizer(str(path))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
