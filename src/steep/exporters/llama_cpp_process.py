"""llama.cpp's answers about a .gguf file, as a separate program: `PYTHON llama_cpp_process.py RESULT.npz < questions.json`.

It runs in any interpreter that has llama-cpp-python, where steep may be missing, so it imports nothing of ours. Key and value
caches are fp32 (llama.cpp's default is fp16), so the comparison is of the file and not of the cache.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np


def main() -> None:
    """Answer the questions on standard input; logits and ids go to the .npz file, the program's name to standard output."""
    import llama_cpp

    asked = json.load(sys.stdin)
    longest = max([len(ids) for ids in asked["texts"].values()] + [len(asked["prompt"]) + asked["new_tokens"]])
    model = llama_cpp.Llama(
        asked["path"], n_ctx=longest + 8, n_batch=longest + 8, n_ubatch=longest + 8, logits_all=True, verbose=False,
        n_gpu_layers=0, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, seed=0,
    )  # fmt: skip
    arrays: dict[str, Any] = {}
    for name, ids in asked["texts"].items():
        model.reset()
        model.eval(ids)
        arrays[f"text:{name}"] = np.array(model.scores[: len(ids)], dtype=np.float32)
    arrays["greedy"] = np.array(_greedy(model, asked["prompt"], asked["new_tokens"]), dtype=np.int64)
    for name, text in asked["strings"].items():
        ids = model.tokenize(text.encode("utf-8"), add_bos=False, special=True)
        arrays[f"ids:{name}"] = np.array(ids, dtype=np.int64)
    np.savez(sys.argv[1], **arrays)
    print(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})")


def _greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    model.reset()
    model.eval(prompt)
    tokens: list[int] = []
    while len(tokens) < new_tokens:
        tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        if len(tokens) < new_tokens:
            model.eval(tokens[-1:])
    return tokens


if __name__ == "__main__":
    main()
