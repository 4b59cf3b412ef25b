"""Whether two versions of steep train the same runs, bit for bit.

In: a folder with the source of steep, such as `src`. Out: a JSON file with everything that small runs computed: every record of
metrics.jsonl, the SHA-256 of every tensor of every checkpoint, scores, ledgers, exports and generated text. Left out is what the
clock or the memory of the process decides. Floats are kept in their hexadecimal form, so that equal means the same bits.

    python benchmarks/same_runs.py record before.json --source /tmp/old/src
    python benchmarks/same_runs.py record after.json --source src
    python benchmarks/same_runs.py compare before.json after.json        # exit code 1, and a list, where they differ

Only steep's command line is used, so the modules behind it may move; the one name that configurations need is given by `--gpt2`.
Texts, tokenizer and models are made here, without a network. Every process computes on one thread of the CPU. Make both
recordings on one machine with the same versions of torch and transformers: others may round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pydoc_data.topics
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

CLOCKS = re.compile(r"seconds|per_second|memory|^(mfu|time)$")
"""Keys of numbers that differ from one process to the next."""

SPEAKING = ("evaluate", "generate", "blend", "average", "lr-find")
"""Commands whose output is recorded."""

SHOWN = 12
"""Differences of a run that are printed without --all."""

# ---- the runs ----


class Run(NamedTuple):
    """One run: what its run.yaml changes in DEFAULTS, and the commands of steep that follow in its folder."""

    changes: dict[str, Any]
    commands: tuple[str, ...] = ("train run.yaml",)


DEFAULTS: dict[str, Any] = {
    "run": {"directory": "runs", "seed": 7},
    "model": {"pretrained": "../inputs/untied"},
    "tokenizer": {"pretrained": "../inputs/tokenizer"},
    "data": {
        "sequence_length": 64, "train": [{"path": "../inputs/domain"}], "validation": {"domain": {"share": 0.1}},
        "cache_directory": "cache", "prepare": {"workers": 1},
    },
    "train": {"global_batch_size": 4, "steps": 6, "device": "cpu", "threads": 1, "precision": "fp32"},
    "optimizer": {"learning_rate": 2e-3},
    "evaluate": {"tokens": 2000},
    "report": {"enabled": False},
    "console": {"log_every_seconds": 0},
}  # fmt: skip
"""A run of a few steps; the folder of each run lies beside `inputs`."""

GPT2_SIZES = {"vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 = {"_target_": "GPT2_TARGET", **GPT2_SIZES, "dropout": 0.1}
HF_GPT2 = {"_target_": "transformers.GPT2Config", **GPT2_SIZES}  # dropout 0.1 by default
TIED = {"pretrained": "../inputs/tied"}
BOTH = ["embed_tokens", "lm_head"]
GENERAL = {"general": {"path": "../inputs/general.jsonl"}}
TWO_TEXTS = {"domain": {"share": 0.1}, **GENERAL}
SOURCES = [
    {"path": "../inputs/domain", "name": "own", "weight": 0.75},
    {"path": "../inputs/replay.jsonl", "name": "old", "weight": 0.25, "role": "replay"},
]
OWN_TEXT = {
    "train": [SOURCES[0], {"path": "auto", "weight": 0.25, "role": "replay", "generate_tokens": 2000}],
    "validation": {"domain": {"share": 0.1}, "general": {"path": "auto", "generate_tokens": 500}},
}
NOISE = {
    "data": {
        "train": [{**SOURCES[0], "weight": 1.0}, {"path": "../inputs/noise.txt", "name": "noise", "weight": 0.0}],
        "phases": [
            {"from_tokens": 40 * 256, "weights": {"own": 0.0, "noise": 1.0}},  # step 40 trains on noise alone
            {"from_tokens": 41 * 256, "weights": {"own": 1.0, "noise": 0.0}},
        ],
        "validation": {},
    },
    "checkpoint": {"every_steps": 15, "keep_last": 9},
    "optimizer": {"learning_rate": 3e-3},
}
MEGATRON = {
    "order": "megatron", "split": "0.9, 0.1, 0.0", "num_val_samples": 6, "document_mask": False, "validation": {},
    "train": [{"path": "out/general/megatron/train", "weight": 0.7}, {"path": "out/replay/megatron/train", "weight": 0.3}],
}  # fmt: skip
PREPARE = "prepare ../inputs/{} --tokenizer ../inputs/tokenizer --workers 1 --out out/{} --format {}"
GENERATE = "generate runs/run --prompt 'The with statement' --max-new-tokens 24 --device cpu --precision fp32"
IN_PARTS = ("train run.yaml --train.max_seconds 0", "train run.yaml")
"""Stopped by the time limit after a step, and continued."""

RUNS: dict[str, Run] = {
    # what is made of a finished run: blend, average, export, generated text
    "afterwards": Run(
        {"data": {"validation": TWO_TEXTS}, "train": {"steps": 9}, "checkpoint": {"every_steps": 3, "keep_last": 3},
         "optimizer": {"learning_rate": 5e-3}},
        ("train run.yaml", "blend runs/run --alphas 0,0.5,0.75 --cap 10 --out out/blend",
         "average runs/run --last 3 --out out/average", "average runs/run --last 3 --weights ema:0.5 --no-score --out out/ema",
         "export runs/run --to hf --dtype float32 --out out/f32", "export runs/run --to hf --dtype bfloat16 --out out/bf16",
         f"{GENERATE} --before", f"{GENERATE} --temperature 0.8 --top-k 20 --seed 3"),
    ),
    # Dropout and accumulation, in four parts. SIGTERM arrives a step earlier or later; what it leaves is not kept.
    "resume": Run(
        {"model": GPT2, "train": {"steps": 40, "micro_batch_size": 2}, "evaluate": {"every_steps": 8},
         "checkpoint": {"keep_last": 1, "keep_best": False}},
        (IN_PARTS[0], IN_PARTS[0], "SIGTERM at 'step  5/'", "train run.yaml"),
    ),
    "longer": Run(  # a finished run that is given more steps
        {"adapter": {"rank": 4, "dropout": 0.1}, "train": {"steps": 3}, "schedule": {"name": "constant"}},
        ("train run.yaml", "train run.yaml --train.steps 7 --resume"),
    ),
    "streamed": Run({"data": {"train": [{"path": "../inputs/jsonl", "stream": True}], "validation": GENERAL}}, IN_PARTS),
    "megatron_order": Run(
        {"data": MEGATRON},
        (PREPARE.format("general.jsonl", "general", "megatron"), PREPARE.format("replay.jsonl", "replay", "megatron"), *IN_PARTS),
    ),
    "nanogpt": Run(
        {"data": {"train": [{"path": "out/store/nanogpt/train.bin", "format": "nanogpt"}], "align_to_bos": True,
                  "validation": GENERAL}},
        (PREPARE.format("domain", "store", "nanogpt") + " --dedup exact", "train run.yaml"),
    ),
    "muon": Run({"optimizer": {"name": "muon", "momentum": 0.9}}, IN_PARTS),
    "galore": Run({"optimizer": {"name": "galore", "rank": 8, "projection_interval_steps": 3}}, IN_PARTS),
    "schedule_free": Run({"optimizer": {"name": "schedule_free_adamw"}}, IN_PARTS),
    "lion": Run({"optimizer": {"name": "lion"}}),
    "adafactor": Run({"optimizer": {"name": "adafactor"}}),
    # documents of differing lengths, packed by best_fit; the forgetting report, at the end and by evaluate
    "llama_tied": Run(
        {"model": TIED, "recipe": "continued_pretraining", "data": {"packing": "best_fit", "validation": TWO_TEXTS},
         "train": {"steps": 12, "micro_batch_size": 1}, "optimizer": {"learning_rate": 5e-3}, "evaluate": {"every_steps": 5}},
        ("train run.yaml", "evaluate runs/run --against base --json --device cpu --precision fp32"),
    ),
    "llama_untied": Run(  # a mixture that changes, a moving average of the weights
        {"data": {"train": SOURCES, "phases": [{"from_tokens": 1280, "weights": {"old": 0.75}}], "validation": TWO_TEXTS},
         "train": {"steps": 10, "ema_decay": 0.9}, "schedule": {"name": "wsd", "warmup_steps": 2, "decay_ratio": 0.4}},
        ("train run.yaml", "average runs/run --weights ema --no-score --out out/ema"),
    ),
    "llama_grouped_bf16": Run(
        {"model": {"pretrained": "../inputs/grouped"}, "train": {"precision": "mixed_bf16", "micro_batch_size": 2}}
    ),
    # fresh weights, three epochs, accumulated gradients, a last step that is short
    "gpt2_dropout": Run(
        {"model": GPT2, "data": {"train": [{"path": "../inputs/short"}], "validation": GENERAL},
         "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": None, "epochs": 3}},
    ),
    "gpt2_transformers": Run(
        {"model": {"_target_": "transformers.AutoModelForCausalLM.from_config", "config": HF_GPT2},
         "data": {"packing": "concat", "document_mask": False}},
    ),
    "adapter": Run(
        {"model": TIED, "adapter": {"rank": 4, "dropout": 0.1, "modules_to_save": BOTH, "lora_plus_ratio": 4},
         "optimizer": {"learning_rate": 1e-2, "embedding_learning_rate": 2e-3}},
        ("train run.yaml", "export runs/run --to hf --dtype float32 --out out/merged"),
    ),
    "dora": Run({"adapter": {"type": "dora", "rank": 4, "targets": ["q_proj", "up_proj"]}}),
    "nf4": Run({"model": {**DEFAULTS["model"], "quantize": "nf4"}, "adapter": {"rank": 4, "rslora": True}}),
    "rollback": Run({**NOISE, "train": {"steps": 50, "on_spike": "rollback"}}),
    "skip": Run({**NOISE, "train": {"steps": 50, "on_spike": "skip"}}),
    "lr_find": Run(
        {"adapter": {"rank": 4, "modules_to_save": BOTH}}, ("lr-find run.yaml --rates 1e-3,3e-3,1e-2 --steps 5 --json",)
    ),
    "vocabulary": Run(
        {"model": TIED, "tokenizer": {"pretrained": None}, "vocabulary": {"add": ["asynchronous", " coroutine", "metaclass"]}}
    ),
    "self_generated": Run({"data": OWN_TEXT}),
    "checkpointing_full": Run({"model": GPT2, "train": {"activation_checkpointing": "full", "loss_chunk_bytes": 65536}}),
    "checkpointing_selective": Run({"model": TIED, "train": {"activation_checkpointing": "selective"}}),
    "freeze": Run(
        {"model": {**TIED, "freeze": {"embeddings": True, "first_layers": 1, "patterns": ["*.layers.1.mlp.*"]}},
         "schedule": {"name": "linear", "warmup_ratio": 0.5}, "train": {"max_grad_norm": None}},
    ),
    "samples": Run(
        {"evaluate": {"every_steps": 2, "prompts": ["The with", "An"], "sample_every_steps": 2, "sample_tokens": 8},
         "checkpoint": {"every_steps": 2, "keep_last": 9}},
    ),
}  # fmt: skip
"""Those of many processes first, so that two at a time end together."""


def write_config(folder: Path, changes: dict[str, Any], gpt2: str) -> None:
    """run.yaml (JSON is YAML): DEFAULTS with the changes merged into its sections."""
    merged = dict(DEFAULTS)
    for section, values in changes.items():
        whole = section == "model" or not isinstance(values, dict)
        merged[section] = values if whole else {**DEFAULTS.get(section, {}), **values}
    text = json.dumps(merged, indent=1).replace("GPT2_TARGET", gpt2)
    (folder / "run.yaml").write_text(text, encoding="utf-8")


def run_command(line: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a command of steep and return what it printed. Raises RuntimeError where it fails."""
    words = shlex.split(line)
    if words[0] == "SIGTERM":
        return terminate(words[-1], folder, environment)
    command = [sys.executable, "-m", "steep", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"steep {line} ended with {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout


def terminate(beginning: str, folder: Path, environment: dict[str, str]) -> str:
    """Train until a line with this beginning comes, then send SIGTERM. Raises RuntimeError where that came too late."""
    command = [sys.executable, "-m", "steep", "train", "run.yaml"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        for line in process.stdout or ():
            if line.startswith(beginning):
                process.send_signal(signal.SIGTERM)
    if process.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"with SIGTERM at {beginning!r} the run ended with {process.returncode}")
    return ""


# ---- what they need ----


def write_inputs(folder: Path) -> None:
    """Texts, a tokenizer of 512 ids and the pretrained models, the same every time."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    documents = [text[: 200 + 173 * (number % 17)] for number, text in enumerate(texts)]
    for name, part in {"domain": documents[:40], "short": documents[:9]}.items():
        for number, text in enumerate(part):
            write_text(folder / name / f"{number:03d}.txt", text)
    lines = {"general": documents[40:55], "replay": documents[55:75]}
    for name, part in {**lines, **{f"jsonl/{n}": documents[n:40:3] for n in range(3)}}.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in part))
    noise = random.Random(1)
    write_text(folder / "noise.txt", "".join(chr(noise.randrange(0x3040, 0x9FFF)) for _ in range(3000)))
    write_models(folder, documents)


def write_text(path: Path, text: str) -> None:
    """A file, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_models(folder: Path, documents: list[str]) -> None:
    """A byte-level BPE trained on the documents, and three Llamas of random weights with it."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(documents, vocab_size=512, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, tied, groups in (("tied", True, 4), ("untied", False, 4), ("grouped", False, 2)):
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=groups, tie_word_embeddings=tied, max_position_embeddings=128, initializer_range=0.1,
            eos_token_id=0, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---- what is recorded ----


def read_results(folder: Path) -> dict[str, Any]:
    """Everything that a run left in its folder, by file."""
    readers = {
        "runs/*/metrics.jsonl": lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()],
        "runs/*/[!pe]*.json": lambda path: json.loads(path.read_text("utf-8")),  # summary, ledger, rollbacks
        "runs/*/samples/*.md": lambda path: path.read_text("utf-8"),
        "runs/*/checkpoints/*/model/consolidated/*.safetensors": tensor_hashes,
        "out/**/*.safetensors": tensor_hashes,
        "out/**/*.bin": lambda path: hashlib.sha256(path.read_bytes()).hexdigest(),
        "out/**/*.idx": lambda path: hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    return {
        str(p.relative_to(folder)): read(p) for pattern, read in readers.items() for p in sorted(folder.glob(pattern))
    }


def tensor_hashes(path: Path) -> dict[str, str]:
    """dtype, shape and SHA-256 of every tensor of a safetensors file; its metadata may differ."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    hashes = {}
    for name, entry in sorted(json.loads(data[8:start]).items()):
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            digest = hashlib.sha256(data[start + first : start + last]).hexdigest()
            hashes[name] = f"{entry['dtype']} {entry['shape']} {digest}"
    return hashes


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
    names = arguments.only or list(RUNS)
    if unknown := set(names) - set(RUNS):
        raise SystemExit(f"no run is called {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    root = Path(arguments.keep or tempfile.mkdtemp(prefix="same_runs_")).resolve()
    environment = child_environment(arguments.source, root)
    try:
        write_inputs(root / "inputs")
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda name: make_run(name, root / name, environment, arguments.gpt2), names))
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    recording = dict(zip(names, results, strict=True))
    Path(arguments.out).write_text(json.dumps(recording, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = [name for name, result in recording.items() if "failed" in result]
    print(f"{len(names)} runs recorded in {arguments.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def child_environment(source: str | None, root: Path) -> dict[str, str]:
    """What every process sees. Raises SystemExit where `source` is not what is imported."""
    fixed = {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120", "CUDA_VISIBLE_DEVICES": "", "STEEP_CACHE": str(root / "cache"), "MPLCONFIGDIR": str(root),
    }  # fmt: skip
    environment = {**os.environ, **fixed}
    if source is not None:
        folder = Path(source).resolve()
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        ask = "import importlib.util; print(importlib.util.find_spec('steep').origin)"
        said = subprocess.run(
            [sys.executable, "-c", ask], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        if not Path(said.stdout.strip()).is_relative_to(folder):
            raise SystemExit(f"--source {source}: steep is imported from {said.stdout.strip()}")
    return environment


def make_run(name: str, folder: Path, environment: dict[str, str], gpt2: str) -> dict[str, Any]:
    """One run and what it gave; a failure is a result too."""
    folder.mkdir(parents=True)
    start = time.monotonic()
    found: dict[str, Any] = {}
    try:
        write_config(folder, RUNS[name].changes, gpt2)
        for line in RUNS[name].commands:
            said = run_command(line, folder, environment)
            if line.startswith(SPEAKING):
                found[line] = json.loads(said) if "--json" in line else said
        found |= read_results(folder)
    except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        found = {"failed": f"{type(error).__name__}: {error}"}
    print(f"{time.monotonic() - start:5.1f} s  {name}  {found.get('failed', '')}", file=sys.stderr, flush=True)
    cleaned: dict[str, Any] = clean(found, str(folder.parent))
    return cleaned


# ---- comparing ----


SENTENCES = ("verdict_sentence", "reason")
"""Keys of text for people, which may be worded anew. They are recorded and not compared."""


def compare(arguments: argparse.Namespace) -> int:
    """Print every difference of two recordings. Returns 1 where there is one."""
    before, after = (json.loads(Path(path).read_text("utf-8")) for path in (arguments.before, arguments.after))
    alone = sorted(before.keys() ^ after.keys())
    for name in alone:
        print(f"{name}: only in {arguments.before if name in before else arguments.after}")
    bad = 0
    for name in sorted(before.keys() & after.keys()):
        found = list(differences(before[name], after[name], name))
        if "failed" in before[name] and not found:
            found = [f"{name}: failed in both"]
        bad += bool(found)
        print("\n".join(found if arguments.all else found[:SHOWN]), end="\n" if found else "")
        if len(found) > SHOWN and not arguments.all:
            print(f"{name}: and {len(found) - SHOWN} more (--all shows them)")
    print(f"{len(before.keys() & after.keys())} runs in both, {bad} of them not the same; {len(alone)} in one only")
    return int(bool(bad or alone))


def differences(before: Any, after: Any, place: str) -> Iterator[str]:
    """One line for each value that differs or stands on one side only."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted((before.keys() | after.keys()) - set(SENTENCES)):
            if key in before and key in after:
                yield from differences(before[key], after[key], f"{place} | {key}")
            else:
                yield f"{place} | {key}: only {'before' if key in before else 'after'}"
    elif isinstance(before, list) and isinstance(after, list):
        for number, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from differences(old, new, f"{place} | {number}")
        if len(before) != len(after):
            yield f"{place}: {len(before)} entries before, {len(after)} after"
    elif before != after:
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
    one.add_argument("--only", type=lambda text: text.split(","), help="names of runs, as in adapter,nf4")
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
