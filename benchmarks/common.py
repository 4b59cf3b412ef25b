"""What the benchmarks share: the two 30M models, synthetic token stores, processes of their own, tables.

Everything measured runs in a process of its own, started here and waited for with its peak resident set, so that no figure
holds what another one left behind. Shared machines are noisy: ways take turns, and medians stand beside smallest and largest.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

GPT2_30M = {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 1024, "vocab_size": 50257}
LLAMA_30M = {
    "num_hidden_layers": 5, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 1024, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {"gpt2": GPT2_30M, "llama": LLAMA_30M}
"""The models of the table: 30.3 M and 32.4 M parameters, dropout 0 in both."""

GPT2_TARGET = "steep.models.gpt2.build_gpt2_model"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def steep_model(name: str) -> dict[str, Any]:
    """The `model` section of a steep run: steep's own GPT-2, transformers' Llama."""
    if name == "gpt2":
        return {"_target_": GPT2_TARGET, **SIZES["gpt2"]}
    return {"config": {"model_type": "llama", **SIZES["llama"]}}


def transformers_model(name: str, seed: int = 0) -> Any:
    """The same architecture as transformers builds it, fresh weights, its default attention."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SIZES["gpt2"], **NO_DROPOUT))
    return LlamaForCausalLM(LlamaConfig(**SIZES["llama"]))


# ---- data ----


def write_tokenizer(directory: Path, vocab_size: int) -> Path:
    """A tokenizer of `vocab_size` made-up words: synthetic stores need one that knows every id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory


def write_store(prefix: Path, vocab_size: int, document_tokens: int, documents: int, seed: int = 0) -> Path:
    """A Megatron .bin/.idx pair of random ids, small ids more often, every document equally long. Returns the prefix."""
    import numpy as np

    from steep.store.formats.megatron import token_dtype, write_index

    dtype = token_dtype(vocab_size)
    rng = np.random.default_rng(seed)
    skewed = rng.random(documents * document_tokens) ** 3  # so that there is something to learn
    (1 + (vocab_size - 1) * skewed).astype(dtype).tofile(prefix.with_suffix(".bin"))
    with open(prefix.with_suffix(".idx"), "wb") as file:
        write_index(file, np.full(documents, document_tokens), dtype)
    return prefix


# ---- processes ----


@dataclass(frozen=True)
class Finished:
    """A process that ended."""

    seconds: float
    peak_bytes: int
    """Largest resident set."""
    output: str
    """Standard output."""


def run_process(command: Sequence[str], environment: Mapping[str, str | None] = {}, check: bool = True) -> Finished:
    """Run a command to its end. environment: changes; None removes a variable. Raises SystemExit with its stderr."""
    merged = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
    for name in (name for name, value in environment.items() if value is None):
        merged.pop(name, None)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=merged) as process:
        output, errors = _drain(process)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if check and process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{errors[-4000:]}")
    return Finished(seconds, usage.ru_maxrss * 1024, output)


def _drain(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Both pipes to their ends, without reaping the process: wait4 must still find it."""
    stdout, stderr = process.stdout, process.stderr
    if stdout is None or stderr is None:
        raise ValueError("the process needs pipes for both of its outputs")
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(stderr.read()))
    reader.start()
    output = stdout.read()
    reader.join()
    return output, "".join(errors)


def steep_train(mapping: dict[str, Any], folder: Path, environment: Mapping[str, str | None] = {}) -> Finished:
    """`steep train` on a configuration, as the command that users type."""
    file = folder / f"{mapping['run']['name']}.json"
    file.write_text(json.dumps(mapping, indent=1), encoding="utf-8")
    return run_process([sys.executable, "-m", "steep", "train", str(file)], environment)


def train_lines(run: Path) -> list[dict[str, Any]]:
    """The training lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def last_json(output: str) -> dict[str, Any]:
    """The JSON object that a worker printed as its last line."""
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def taking_turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Results of each way, `repeats` rounds of one run each, so that other load on the machine meets all alike."""
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for number in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name].append(way())
            print(f"  {number + 1}/{repeats} {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return results


# ---- words ----


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """`median (smallest-largest)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def heading() -> str:
    """Command, machine, load and versions: what a result must be read with."""
    from steep.runtime.device import cpu_has_bf16, cpu_name

    packages = {name: _version(name) for name in ("steep", "torch", "transformers", "accelerate", "numpy")}
    missing = "has no bf16 hardware: where a table asks for bf16, fp32 is measured and bf16 is missing"
    bf16 = "computes bf16 in hardware" if cpu_has_bf16() else missing
    load = " ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return "\n".join(
        [
            f"- command: `python {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`, commit {_commit()}",
            f"- machine: {cpu_name()}, {platform.system()}; {bf16}",
            f"- load average at the start (1, 5, 15 minutes): {load}",
            *(
                f"- {name}={os.environ[name]} for all"
                for name in sorted(os.environ)
                if name.startswith(("OMP_", "MKL_", "GOMP_"))
            ),
            f"- python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in packages.items() if v),
        ]
    )


def gpu_heading() -> str:
    """What a result of a GPU must be read with besides. Raises SystemExit where torch finds none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks/{Path(sys.argv[0]).name} needs a CUDA device; torch finds none here")
    return f"- GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


# ---- what peers' trainers are asked while they train ----


def step_clock() -> Any:
    """A callback of transformers' Trainer with `ends`, the times at which steps ended."""
    from transformers import TrainerCallback  # a peer's process alone needs it

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *positional: Any, **named: Any) -> None:
            self.ends.append(time.time())

    return Clock()


class CountingCollator:
    """A collator that notes of each batch how many ids it has, and how many of them are real as `count(rows, batch)` counts."""

    def __init__(self, collator: Any, count: Callable[[list[Any], Any], int]) -> None:
        self.collator, self.count = collator, count
        self.real: list[int] = []
        self.all: list[int] = []

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        self.real.append(self.count(rows, batch))
        self.all.append(batch["input_ids"].numel())
        return batch

    @property
    def padding_ratio(self) -> float:
        return 1 - sum(self.real) / sum(self.all)


def linear_adapter(rank: int) -> Any:
    """The adapter that steep's run has: LoRA on all linear layers, alpha as large as the rank."""
    from peft import LoraConfig  # a peer's process alone needs it

    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def real_tokens_per_second(ends: Sequence[float], tokens: Sequence[int], skip: int) -> float:
    """Over the steps after the first `skip`. ends: the times at which steps ended. tokens: of each step."""
    seconds = [stop - start for start, stop in itertools.pairwise(ends[skip - 1 :])]
    return sum(tokens[skip : len(ends)]) / sum(seconds)
