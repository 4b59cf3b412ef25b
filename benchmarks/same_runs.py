"""Whether two versions of steep train the same runs, bit for bit.

In: a folder with the source of steep, such as `src`. Out: a JSON file with everything that small runs computed: every record of
metrics.jsonl, the SHA-256 of every tensor of every checkpoint, scores, ledgers, exports and generated text. Left out is what the
clock or the memory of the process decides. Floats are kept as their hexadecimal form, so that equal means the same bits.

    python benchmarks/same_runs.py record before.json --source /tmp/old/src
    python benchmarks/same_runs.py record after.json --source src
    python benchmarks/same_runs.py compare before.json after.json        # exit code 1, and a list, where they differ

Only steep's command line is used, so the modules behind it may move; the one name that a configuration needs is `--gpt2`. Texts,
tokenizer and models are made here, without a network. Every process computes on one CPU thread. Both recordings belong on one
machine with the same versions of torch and transformers: others may round differently. `--keep DIR` leaves the runs in DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pydoc_data.topics
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLOCKS = re.compile(r"seconds|per_second|memory|^(mfu|time)$")
"""Keys of numbers that differ from one process to the next."""

STEEP = ["-m", "steep"]
SHOWN = 12
"""Differences of a run that are printed without --all."""

LLAMA = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.1, "eos_token_id": 0, "bos_token_id": None,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True}, "untied": {"tie_word_embeddings": False},
    "grouped": {"tie_word_embeddings": False, "num_key_value_heads": 2},
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
BOTH_TEXTS = {"domain": {"share": 0.1}, "general": {"path": "../inputs/general.jsonl"}}
PROMPT = "The with statement"


@dataclass
class Work:
    """The folder of one run, and how commands are started in it."""

    folder: Path
    environment: dict[str, str]
    gpt2: str
    said: dict[str, Any] = field(default_factory=dict)
    """What commands printed, by a name."""

    def steep(self, *arguments: str, code: int = 0) -> str:
        """Run a command of steep and return what it printed. Raises RuntimeError where it ends with another code."""
        command = [sys.executable, *STEEP, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=200)
        if done.returncode != code:
            raise RuntimeError(f"steep {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-1500:]}")
        return done.stdout

    def config(self, **changes: Any) -> str:
        """Write run.yaml (JSON is YAML): a run of a few seconds with `changes` merged into its sections. Returns its path."""
        mapping: dict[str, Any] = {
            "run": {"directory": "runs", "seed": 7},
            "model": {"pretrained": "../inputs/untied"},
            "tokenizer": {"pretrained": "../inputs/tokenizer"},
            "data": {
                "sequence_length": 64, "train": [{"path": "../inputs/domain"}], "validation": {"domain": {"share": 0.1}},
                "cache_directory": "cache", "prepare": {"workers": 1},
            },
            "train": {"global_batch_size": 4, "steps": 6, "device": "cpu", "threads": 1, "precision": "fp32"},
            "optimizer": {"learning_rate": 1e-3},
            "evaluate": {"tokens": 2000},
            "report": {"enabled": False},
        }  # fmt: skip
        for section, values in changes.items():
            replaced = section == "model" or not isinstance(values, dict)
            mapping[section] = values if replaced else {**mapping.get(section, {}), **values}
        (self.folder / "run.yaml").write_text(json.dumps(mapping, indent=1), encoding="utf-8")
        return "run.yaml"

    def train(self, **changes: Any) -> None:
        """Train a run to its end."""
        self.steep("train", self.config(**changes))

    def terminate_at(self, beginning: str) -> None:
        """Train run.yaml until a line with this beginning comes, send SIGTERM and wait for the end."""
        command = [sys.executable, *STEEP, "train", "run.yaml"]
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(beginning):
                    process.send_signal(signal.SIGTERM)
                    break
            process.stdout.read()
        if process.returncode != 128 + signal.SIGTERM:
            raise RuntimeError(f"a run that got SIGTERM at {beginning!r} ended with {process.returncode}")


# ---- the runs ----


def gpt2_dropout(work: Work) -> None:
    """steep's GPT-2 from fresh weights: dropout, accumulated gradients, three epochs, a last step that is short."""
    work.train(
        model={"_target_": work.gpt2, **GPT2_SIZES, "dropout": 0.1},
        data={"train": [{"path": "../inputs/short"}]},
        train={"global_batch_size": 6, "micro_batch_size": 2, "steps": None, "epochs": 3},
    )  # fmt: skip


def gpt2_transformers(work: Work) -> None:
    """transformers' GPT-2, built by `_target_` from a nested one, dropout 0.1 by default; documents see each other."""
    config = {"_target_": "transformers.GPT2Config", **GPT2_SIZES}
    work.train(
        model={"_target_": "transformers.AutoModelForCausalLM.from_config", "config": config},
        data={"packing": "concat", "document_mask": False},
    )  # fmt: skip


def llama_tied(work: Work) -> None:
    """Pretrained, best_fit packing, own and general text held out: the forgetting report, at the end and by evaluate."""
    work.train(
        model={"pretrained": "../inputs/tied"}, data={"packing": "best_fit", "validation": BOTH_TEXTS},
        train={"steps": 12, "micro_batch_size": 1}, optimizer={"learning_rate": 5e-3}, evaluate={"every_steps": 5},
        recipe="continued_pretraining",
    )  # fmt: skip
    evaluate = ["evaluate", "runs/run", "--against", "base", "--json", "--device", "cpu", "--precision", "fp32"]
    work.said["evaluate"] = json.loads(work.steep(*evaluate))


def llama_untied(work: Work) -> None:
    """A mixture with replay and a phase, wsd schedule, a moving average of the weights."""
    sources = [
        {"path": "../inputs/domain", "name": "own", "weight": 0.75},
        {"path": "../inputs/replay.jsonl", "name": "old", "weight": 0.25, "role": "replay"},
    ]
    work.train(
        data={"train": sources, "phases": [{"from_tokens": 1280, "weights": {"own": 0.5, "old": 0.5}}], "validation": BOTH_TEXTS},
        train={"steps": 10, "ema_decay": 0.9}, schedule={"name": "wsd", "warmup_steps": 2, "decay_ratio": 0.4},
    )  # fmt: skip
    work.steep("average", "runs/run", "--weights", "ema", "--no-score", "--out", "out/ema")


def llama_grouped_bf16(work: Work) -> None:
    """Grouped queries, autocast to bf16."""
    work.train(model={"pretrained": "../inputs/grouped"}, train={"precision": "mixed_bf16", "micro_batch_size": 2})


def adapter(work: Work) -> None:
    """LoRA with dropout on a tied model, embeddings trained beside it at their own rate."""
    work.train(
        model={"pretrained": "../inputs/tied"},
        adapter={"rank": 4, "dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head"], "lora_plus_ratio": 4},
        optimizer={"learning_rate": 1e-2, "embedding_learning_rate": 2e-3},
    )  # fmt: skip
    work.steep("export", "runs/run", "--to", "hf", "--dtype", "float32", "--out", "out/merged")


def dora(work: Work) -> None:
    """DoRA on named layers."""
    work.train(adapter={"type": "dora", "rank": 4, "targets": ["q_proj", "up_proj"]}, optimizer={"learning_rate": 1e-2})


def nf4(work: Work) -> None:
    """QLoRA: a 4-bit base."""
    work.train(model={"pretrained": "../inputs/untied", "quantize": "nf4"}, adapter={"rank": 4, "rslora": True})


def streamed(work: Work) -> None:
    """Text that is tokenized while training, stopped by its time limit after one step and continued."""
    sources = [{"path": "../inputs/jsonl", "stream": True}]
    config = work.config(data={"train": sources, "validation": {"general": BOTH_TEXTS["general"]}})
    work.steep("train", config, "--train.max_seconds", "0")
    work.steep("train", config)


def megatron_order(work: Work) -> None:
    """Two Megatron datasets, written by prepare, in megatron-core's order."""
    for name in ("general", "replay"):
        prepare = ["prepare", f"../inputs/{name}.jsonl", "--tokenizer", "../inputs/tokenizer", "--out", f"out/{name}"]
        work.steep(*prepare, "--format", "megatron", "--workers", "1")
    found = [sorted((work.folder / "out" / name / "megatron").glob("*.idx"))[0] for name in ("general", "replay")]
    prefixes = [str(path.relative_to(work.folder).with_suffix("")) for path in found]
    work.train(
        data={
            "order": "megatron", "split": "0.9, 0.1, 0.0", "num_val_samples": 6, "document_mask": False, "validation": {},
            "train": [{"path": prefixes[0], "weight": 0.7}, {"path": prefixes[1], "weight": 0.3}],
        },
    )  # fmt: skip


def nanogpt(work: Work) -> None:
    """A nanoGPT .bin, written by prepare, as the source."""
    prepare = ["prepare", "../inputs/domain", "--tokenizer", "../inputs/tokenizer", "--out", "out/store", "--dedup", "exact"]
    work.steep(*prepare, "--format", "nanogpt", "--workers", "1")
    [path] = sorted((work.folder / "out/store/nanogpt").rglob("*.bin"))
    source = {"path": str(path.relative_to(work.folder)), "format": "nanogpt"}
    work.train(data={"train": [source], "align_to_bos": True, "validation": {"general": BOTH_TEXTS["general"]}})


def lr_find(work: Work) -> None:
    """Three rates, and four of the embeddings beside an adapter."""
    config = work.config(adapter={"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]})
    work.said["lr_find"] = json.loads(work.steep("lr-find", config, "--rates", "1e-3,3e-3,1e-2", "--steps", "5", "--json"))


def spike(work: Work, mode: str) -> None:
    """A run whose step 24 trains on noise alone; what follows must be in its ledger."""
    sources = [{"path": "../inputs/domain", "name": "good", "weight": 1.0}, {"path": "../inputs/noise.txt", "weight": 0.0}]
    phases = [
        {"from_tokens": 24 * 256, "weights": {"good": 0.0, "noise.txt": 1.0}},
        {"from_tokens": 25 * 256, "weights": {"good": 1.0, "noise.txt": 0.0}},
    ]
    work.train(
        data={"train": sources, "phases": phases, "validation": {}}, checkpoint={"every_steps": 10, "keep_last": 9},
        train={"steps": 34, "on_spike": mode, "spike_window_steps": 4}, optimizer={"learning_rate": 3e-3},
    )  # fmt: skip
    ledger = json.loads((work.folder / "runs/run/ledger.json").read_text())
    if not ledger["spikes"] or bool(ledger["rollbacks"]) != (mode == "rollback"):
        raise RuntimeError(f"the noise was to cause a spike and {mode}")


def rollback(work: Work) -> None:
    """The run goes back to its checkpoint."""
    spike(work, "rollback")


def skip(work: Work) -> None:
    """The step makes no update."""
    spike(work, "skip")


def resume(work: Work) -> None:
    """Dropout and accumulation, stopped by its time limit after each of two steps, by SIGTERM at the fifth, then to the end.

    SIGTERM arrives a step earlier or later; the checkpoints that it leaves are not kept, and the end does not depend on it.
    """
    work.config(
        model={"_target_": work.gpt2, **GPT2_SIZES, "dropout": 0.1}, checkpoint={"keep_last": 1, "keep_best": False},
        train={"steps": 40, "micro_batch_size": 2}, evaluate={"every_steps": 8},
    )  # fmt: skip
    for _ in range(2):
        work.steep("train", "run.yaml", "--train.max_seconds", "0")
    work.terminate_at("step  5/")
    if json.loads((work.folder / "runs/run/summary.json").read_text())["status"] != "interrupted":
        raise RuntimeError("SIGTERM came too late")
    work.steep("train", "run.yaml")


def longer(work: Work) -> None:
    """A finished adapter run that is made longer: the same command with more steps."""
    config = work.config(adapter={"rank": 4, "dropout": 0.1}, train={"steps": 3}, schedule={"name": "constant"})
    work.steep("train", config)
    work.steep("train", config, "--train.steps", "7", "--resume")


def vocabulary(work: Work) -> None:
    """New tokens, trained in full."""
    model = {"pretrained": "../inputs/tied"}
    work.train(model=model, tokenizer={"pretrained": None}, vocabulary={"add": ["statement", " expression", "identifier"]})


def self_generated(work: Work) -> None:
    """Text that the base model writes itself, as replay and as a held-out text."""
    replay = {"path": "auto", "weight": 0.25, "role": "replay", "generate_tokens": 2000}
    work.train(
        data={
            "train": [{"path": "../inputs/domain", "weight": 0.75}, replay],
            "validation": {"domain": {"share": 0.1}, "general": {"path": "auto", "generate_tokens": 500}},
        },
    )  # fmt: skip


def checkpointed(work: Work) -> None:
    """Activation checkpointing with dropout, full and selective; a logits chunk of few rows."""
    for mode in ("full", "selective"):
        work.train(
            run={"name": mode}, model={"_target_": work.gpt2, **GPT2_SIZES, "dropout": 0.1},
            train={"activation_checkpointing": mode, "loss_chunk_bytes": 65536},
        )  # fmt: skip


def optimizer(work: Work, name: str, **settings: Any) -> None:
    """One of the other optimizers, stopped after a step and continued."""
    config = work.config(optimizer={"name": name, "learning_rate": 2e-3, **settings})
    work.steep("train", config, "--train.max_seconds", "0")
    work.steep("train", config)


def muon(work: Work) -> None:
    """Muon, with AdamW for embeddings and norms."""
    optimizer(work, "muon", momentum=0.9)


def galore(work: Work) -> None:
    """GaLore, projected anew every third step."""
    optimizer(work, "galore", rank=8, projection_interval_steps=3)


def schedule_free(work: Work) -> None:
    """Schedule-free AdamW, whose evaluated weights are not those that take gradients."""
    optimizer(work, "schedule_free_adamw")


def lion_and_adafactor(work: Work) -> None:
    """Two more optimizers."""
    for name in ("lion", "adafactor"):
        work.train(run={"name": name}, optimizer={"name": name, "learning_rate": 1e-3})


def freeze(work: Work) -> None:
    """Embeddings, the first layer and what a pattern names stay; linear schedule, no clipping."""
    work.train(
        model={"pretrained": "../inputs/tied", "freeze": {"embeddings": True, "first_layers": 1, "patterns": ["*.layers.1.mlp.*"]}},
        schedule={"name": "linear", "warmup_ratio": 0.5}, train={"max_grad_norm": None},
    )  # fmt: skip


def samples(work: Work) -> None:
    """Samples while it trains, a checkpoint every other step, all kept."""
    work.train(
        evaluate={"every_steps": 2, "prompts": [PROMPT, "An"], "sample_every_steps": 2, "sample_tokens": 8},
        checkpoint={"every_steps": 2, "keep_last": 9},
    )  # fmt: skip


def afterwards(work: Work) -> None:
    """What is made of a finished run: blend, average, export and greedy text."""
    work.train(
        data={"validation": BOTH_TEXTS}, train={"steps": 9}, checkpoint={"every_steps": 3, "keep_last": 3},
        optimizer={"learning_rate": 5e-3},
    )  # fmt: skip
    work.said["blend"] = work.steep("blend", "runs/run", "--alphas", "0,0.5,0.75", "--cap", "10", "--out", "out/blend")
    work.said["average"] = work.steep("average", "runs/run", "--last", "3", "--out", "out/average")
    work.steep("average", "runs/run", "--last", "3", "--weights", "ema:0.5", "--no-score", "--out", "out/average_ema")
    for dtype in ("float32", "bfloat16"):
        work.steep("export", "runs/run", "--to", "hf", "--dtype", dtype, "--out", f"out/{dtype}")
    generate = ["generate", "runs/run", "--prompt", PROMPT, "--before", "--max-new-tokens", "24", "--device", "cpu"]
    work.said["greedy"] = work.steep(*generate, "--precision", "fp32")
    work.said["sampled"] = work.steep(*generate, "--precision", "fp32", "--temperature", "0.8", "--top-k", "20", "--seed", "3")


RUNS: list[Callable[[Work], None]] = [
    afterwards, resume, streamed, muon, galore, schedule_free, megatron_order, self_generated, llama_tied, adapter, nanogpt,
    checkpointed, lion_and_adafactor, longer, llama_untied, rollback, skip, gpt2_dropout, gpt2_transformers, nf4, dora,
    llama_grouped_bf16, lr_find, vocabulary, freeze, samples,
]  # fmt: skip
"""Those of many processes first, so that two at a time end together."""


# ---- what they need ----


def write_inputs(folder: Path) -> None:
    """Texts, a tokenizer of 512 ids and the pretrained models, the same every time."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    documents = [text[: 200 + 173 * (number % 17)] for number, text in enumerate(texts)]
    write_files(folder / "domain", documents[:40])
    write_files(folder / "short", documents[:9])
    write_lines(folder / "general.jsonl", documents[40:55])
    write_lines(folder / "replay.jsonl", documents[55:75])
    for number in range(3):
        write_lines(folder / "jsonl" / f"{number}.jsonl", documents[number:40:3])
    noise = random.Random(1)
    (folder / "noise.txt").write_text("".join(chr(noise.randrange(0x3040, 0x9FFF)) for _ in range(3000)), encoding="utf-8")
    tokenizer = write_tokenizer(folder / "tokenizer", documents)
    for name, changes in MODELS.items():
        write_model(folder / name, tokenizer, {**LLAMA, **changes})


def write_files(folder: Path, documents: list[str]) -> None:
    """One file for each document."""
    folder.mkdir(parents=True)
    for number, text in enumerate(documents):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")


def write_lines(path: Path, documents: list[str]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def write_tokenizer(folder: Path, documents: list[str]) -> Any:
    """A byte-level BPE trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    made.save_pretrained(folder)
    return made


def write_model(folder: Path, tokenizer: Any, sizes: dict[str, Any]) -> None:
    """A Llama with random weights, and the tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- what is recorded ----


def read_results(work: Work, work_root: Path) -> dict[str, Any]:
    """Everything that a run left in its folder, without clocks and without the place of the folder."""
    found: dict[str, Any] = {"said": work.said}
    patterns = ["runs/*/metrics.jsonl", "runs/*/summary.json", "runs/*/ledger.json", "runs/*/rollbacks.json"]
    for path in files_of(work.folder, *patterns):
        text = path.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        found[str(path.relative_to(work.folder))] = records
    for path in files_of(work.folder, "runs/*/samples/*.md"):
        found[str(path.relative_to(work.folder))] = path.read_text(encoding="utf-8")
    weights = files_of(work.folder, "runs/*/checkpoints/*/model/consolidated/*.safetensors", "out/**/*.safetensors")
    for path in weights:
        found[str(path.relative_to(work.folder))] = tensor_hashes(path)
    for path in files_of(work.folder, "out/**/*.bin", "out/**/*.idx"):
        found[str(path.relative_to(work.folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    cleaned: dict[str, Any] = clean(found, str(work_root))
    return cleaned


def files_of(folder: Path, *patterns: str) -> list[Path]:
    """The files that match, in order."""
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def tensor_hashes(path: Path) -> dict[str, str]:
    """dtype, shape and SHA-256 of every tensor of a safetensors file; its metadata may differ."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    return {name: tensor_hash(entry, data, start) for name, entry in sorted(header.items())}


def tensor_hash(entry: dict[str, Any], data: bytes, start: int) -> str:
    """One tensor as a line of text."""
    first, last = entry["data_offsets"]
    digest = hashlib.sha256(data[start + first : start + last]).hexdigest()
    return f"{entry['dtype']} {entry['shape']} {digest}"


def clean(value: Any, root: str) -> Any:
    """The value without clocks, floats as hexadecimal text, the temporary folder's name replaced."""
    if isinstance(value, dict):
        return {key: clean(item, root) for key, item in value.items() if not CLOCKS.search(key)}
    if isinstance(value, list):
        return [clean(item, root) for item in value]
    if isinstance(value, str):
        return value.replace(root, "<work>")
    return value.hex() if isinstance(value, float) else value


def record(arguments: argparse.Namespace) -> int:
    """Make the runs, two at a time, and write what they gave. Returns 1 where one failed."""
    unknown = set(arguments.only) - {run.__name__ for run in RUNS}
    if unknown:
        raise SystemExit(f"no run is called {', '.join(sorted(unknown))}; known: {', '.join(run.__name__ for run in RUNS)}")
    runs = [run for run in RUNS if not arguments.only or run.__name__ in arguments.only]
    root = Path(arguments.keep or tempfile.mkdtemp(prefix="same_runs_")).resolve()
    environment = child_environment(arguments.source, root)
    try:
        write_inputs(root / "inputs")
        works = [Work(root / run.__name__, environment, arguments.gpt2) for run in runs]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(make_run, runs, works))
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    recording = {run.__name__: result for run, result in zip(runs, results, strict=True)}
    Path(arguments.out).write_text(json.dumps(recording, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = [name for name, result in recording.items() if "failed" in result]
    print(f"{len(runs)} runs recorded in {arguments.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def child_environment(source: str | None, root: Path) -> dict[str, str]:
    """What every process sees. Raises SystemExit where `source` is not what is imported."""
    fixed = {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "STEEP_CACHE": str(root / "cache"), "MPLCONFIGDIR": str(root / "matplotlib"),
    }  # fmt: skip
    environment = {**os.environ, **fixed}
    if source is not None:
        folder = Path(source).resolve()
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        ask = "import importlib.util; print(importlib.util.find_spec('steep').origin)"
        found = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
        if not Path(found.stdout.strip()).is_relative_to(folder):
            raise SystemExit(f"--source {source}: steep is imported from {found.stdout.strip()}")
    return environment


def make_run(run: Callable[[Work], None], work: Work) -> dict[str, Any]:
    """One run and what it gave; a failure is a result too."""
    work.folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        run(work)
        result = read_results(work, work.folder.parent)
    except (RuntimeError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        result = {"failed": f"{type(error).__name__}: {error}".replace(str(work.folder.parent), "<work>")}
    print(f"{time.monotonic() - start:5.1f} s  {run.__name__}  {result.get('failed', '')}", file=sys.stderr, flush=True)
    return result


# ---- comparing ----


def compare(arguments: argparse.Namespace) -> int:
    """Print every difference of two recordings. Returns 1 where there is one."""
    before, after = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (arguments.before, arguments.after))
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name}: only in {arguments.before if name in before else arguments.after}")
    both = sorted(before.keys() & after.keys())
    differing = [name for name in both if show_differences(name, before[name], after[name], arguments.all)]
    failed = [name for name in both if "failed" in before[name] or "failed" in after[name]]
    print(f"{len(both)} runs in both, {len(both) - len(differing)} the same" + (f", failed: {failed}" if failed else ""))
    return int(bool(differing or failed or before.keys() ^ after.keys()))


def show_differences(name: str, before: Any, after: Any, everything: bool) -> bool:
    """Print those of one run; whether there are any."""
    found = list(differences(before, after, ""))
    for line in found if everything else found[:SHOWN]:
        print(f"{name}{line}")
    if len(found) > SHOWN and not everything:
        print(f"{name}: and {len(found) - SHOWN} more (--all shows them)")
    return bool(found)


def differences(before: Any, after: Any, place: str) -> Iterator[str]:
    """One line for each value that differs or stands on one side only."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in after or key not in before:
                yield f"{place} | {key}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], f"{place} | {key}")
    elif isinstance(before, list) and isinstance(after, list):
        for number, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from differences(old, new, f"{place} | {number}")
        if len(before) != len(after):
            yield f"{place}: {len(before)} entries before, {len(after)} after"
    elif type(before) is not type(after) or before != after:
        yield f"{place}: {readable(before)} -> {readable(after)}"


def readable(value: Any) -> str:
    """A value for people: floats as decimals, long text cut."""
    if isinstance(value, str) and re.fullmatch(r"-?0x[01]\.[0-9a-f]+p[+-]\d+", value):
        return repr(float.fromhex(value))
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 160 else text[:157] + "..."


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("record", help="make the runs and write what they gave")
    one.add_argument("out")
    one.add_argument("--source", help="folder that holds the package steep; default: the one that is installed")
    one.add_argument("--only", type=lambda text: text.split(","), default=[], help="names of runs, as in adapter,nf4")
    one.add_argument("--keep", help="a new folder that the runs are left in")
    one.add_argument("--gpt2", default="steep.models.gpt2.build_gpt2_model", help="the _target_ of steep's GPT-2")
    one.set_defaults(call=record)
    two = commands.add_parser("compare", help="name every difference; exit code 1 where there is one")
    two.add_argument("before")
    two.add_argument("after")
    two.add_argument("--all", action="store_true", help=f"more than {SHOWN} differences of a run")
    two.set_defaults(call=compare)
    arguments = parser.parse_args()
    return int(arguments.call(arguments))


if __name__ == "__main__":
    sys.exit(main())
