"""How often the 90 % band of a forecast holds what it forecast, on real runs of small models.

    python benchmarks/forecast.py [--steps 300] [--runs 24] [--folder F]

Llamas of 0.2 M parameters are trained on Python's own documentation with different learning rates, schedules, batch sizes and
seeds, half of them from scratch, half continued from a model that read other pages. Forecasts made at 15, 30, 50 and 75 % of each
run are compared with the mean training loss of its last 20th.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from common import heading, table

LLAMA = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MOMENTS = (0.15, 0.3, 0.5, 0.75)


def main() -> None:
    """Train, forecast, print a Markdown section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others count up")
    parser.add_argument("--folder", help="keep the runs here; those that are there are not made again")
    arguments = parser.parse_args()
    print(heading(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        prepare(folder)
        base = run(folder, "base", {"config": LLAMA}, "other", arguments.steps, 3e-3, "cosine", 8, 0)
        found = []
        choices = itertools.product(("scratch", "continued"), ("cosine", "wsd", "constant"), (3e-3, 5e-4), (4, 16))
        every = list(choices)
        for number in range(arguments.runs):
            start, schedule, rate, batch = every[number * len(every) // arguments.runs]
            model = {"config": LLAMA} if start == "scratch" else {"pretrained": str(base)}
            path = run(
                folder, f"run{number}", model, "text", arguments.steps, rate, schedule, batch, arguments.seed + number
            )
            found.append(([start, schedule, f"{rate:g}", str(batch)], judge(path)))
    rows = [[*names, *(shown(*values) for values in judged)] for names, judged in found]
    print(table(["start", "schedule", "rate", "batch", *(f"at {moment:.0%}" for moment in MOMENTS)], rows))
    for index, moment in enumerate(MOMENTS):
        held = sum(low <= final <= high for _, judged in found for _, low, high, final in [judged[index]])
        wide = sum(j[index][2] - j[index][1] for _, j in found) / len(found)
        error = sum(abs(j[index][0] - j[index][3]) for _, j in found) / len(found)
        print(
            f"- at {moment:.0%} the band held {held} of {len(found)}; mean width {wide:.3f}, mean error {error:.3f} nats"
        )


def shown(expected: float, low: float, high: float, final: float) -> str:
    """A forecast and what came."""
    return f"{expected:.3f} ({low:.3f} to {high:.3f}), was {final:.3f}" + ("" if low <= final <= high else " ✗")


def prepare(folder: Path) -> None:
    """Two halves of the pages as text, and a tokenizer made from them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from steep.demo import language_reference, standard_library_docstrings

    pages = [text for _, text in (*language_reference(), *standard_library_docstrings())]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(pages, vocab_size=1024, special_tokens=["<|endoftext|>"], show_progress=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(folder / "tokenizer")
    for name, half in (("text", pages[::2]), ("other", pages[1::2])):
        lines = (json.dumps({"text": text}) + "\n" for text in half)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def run(
    folder: Path,
    name: str,
    model: dict[str, Any],
    text: str,
    steps: int,
    rate: float,
    schedule: str,
    batch: int,
    seed: int,
) -> Path:
    """One run's directory."""
    import steep

    if (folder / "runs" / name / "summary.json").is_file():
        return folder / "runs" / name
    steep.train(
        {
            "run": {"name": name, "directory": str(folder / "runs"), "seed": seed},
            "model": model,
            "tokenizer": {"pretrained": str(folder / "tokenizer")},
            "data": {
                "sequence_length": 64,
                "train": [{"path": str(folder / f"{text}.jsonl")}],
                "cache_directory": str(folder / "cache"),
            },
            "train": {"global_batch_size": batch, "steps": steps, "device": "cpu", "threads": 1},
            "optimizer": {"learning_rate": rate},
            "schedule": {
                "name": schedule,
                "warmup_ratio": 0.05,
                **({} if schedule == "constant" else {"final_ratio": 0.1}),
            },
            "console": {"log_every_steps": 10**6},
            "report": {"enabled": False},
            "checkpoint": {"keep_best": False},
        }
    )
    return folder / "runs" / name


def judge(run_directory: Path) -> list[tuple[float, float, float, float]]:
    """Expected, low, high and what came, at each moment."""
    from steep.optim.config import ScheduleConfig
    from steep.training.forecast import Forecaster, last_steps

    config = yaml.safe_load((run_directory / "config.yaml").read_text())
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    ends = last_steps(len(lines))
    final = sum(lines[step]["loss"] for step in ends) / len(ends)
    forecaster = Forecaster(len(lines), ScheduleConfig(**config["schedule"]))
    made = forecaster.observe([{key: line[key] for key in ("kind", "step", "loss")} for line in lines])
    chosen = [made[round(moment * len(lines))] for moment in MOMENTS]
    return [(line["forecast_loss"], line["forecast_low"], line["forecast_high"], final) for line in chosen]


if __name__ == "__main__":
    main()
