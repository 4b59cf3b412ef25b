"""What several tests share: small runs through the real command and the real loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def run_mapping(directory: Path, corpus: Path, tokenizer: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run of a few seconds; `changes` are merged into its sections."""
    mapping: dict[str, Any] = {
        "run": {"name": "small", "directory": str(directory / "runs"), "seed": 7},
        "model": {"config": LLAMA},
        "tokenizer": {"pretrained": str(tokenizer)},
        "data": {
            "sequence_length": 64,
            "train": [{"path": str(corpus)}],
            "validation": {"heldout": {"share": 0.1}},
            "cache_directory": str(directory / "cache"),
        },
        "train": {"global_batch_size": 4, "steps": 6, "threads": 1, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every_steps": 2},
        "evaluate": {"tokens": 2000},
        "console": {"log_every_seconds": 0},
        "report": {"enabled": False},
    }
    for section, values in changes.items():
        mapping[section] = {**mapping.get(section, {}), **values} if section != "model" else values
    return mapping


def write_yaml(mapping: dict[str, Any], path: Path) -> Path:
    """The configuration as a file; JSON is YAML."""
    path.write_text(json.dumps(mapping, indent=1), encoding="utf-8")
    return path


def steep(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command `steep` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "steep", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def train_lines(run: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every training line."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in train_lines(run)]
