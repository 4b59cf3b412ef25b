"""The files of a checkpoint: every rank writes its own, then the first rank adds those of the whole run, the manifest last.

model/rank_*.safetensors, optim/rank_*.safetensors and rng/rank_*.json are of one rank each; everything is fsynced.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import steep
from steep.checkpoint.consolidate import write_consolidated
from steep.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, canonical_text, write_file
from steep.checkpoint.pieces import Piece
from steep.checkpoint.safetensors_writer import write_safetensors
from steep.checkpoint.shards import Index, index_of, index_text, merge_indexes, rank_file
from steep.core.errors import CheckpointError
from steep.core.files import sync_directory

CONSOLIDATED_FILE = "model.safetensors"


@dataclass(frozen=True)
class CheckpointState:
    """Everything a run needs to go on, between two steps, as one rank holds it. Tensors are the live ones: `save` copies them.

    Pieces and random number generators are this rank's own. Everything else is written as the first rank has it.
    """

    model: Sequence[Piece]
    optimizer: Sequence[Piece]
    optimizer_state: Mapping[str, Any]
    rng: Mapping[str, Any]
    config_yaml: str
    step: int
    tokens: int
    sequences_seen: int
    plan_fingerprint: str
    """Of the sample order. The name is the manifest's key."""
    train_state: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the loop wants back, as JSON."""
    hf_files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that make model/consolidated loadable by transformers, by name: see `huggingface_files`."""
    weights_file: str = CONSOLIDATED_FILE
    """What transformers or peft call the file of the weights in model/consolidated."""
    score: float | None = None
    """Held-out loss for retention; lower is better."""


def size_of(pieces: Sequence[Piece]) -> int:
    """Bytes of the pieces' tensors."""
    return sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces)


@dataclass(frozen=True)
class RankFiles:
    """What one rank has written: its files by name, and where its tensors lie in them."""

    files: dict[str, FileEntry]
    model: Index
    optimizer: Index


def make_folder(root: Path) -> Path:
    """Make the new folder `root` with those inside it; returns it."""
    if root.exists():
        shutil.rmtree(root)
    root.mkdir()  # without its parents: a run directory that was removed meanwhile is not made again
    for folder in ("model/consolidated", "optim", "rng"):
        (root / folder).mkdir(parents=True)
    return root


def write_rank_files(root: Path, rank: int, state: CheckpointState) -> RankFiles:
    """Write the files of this rank. Raises OSError, CheckpointError."""
    file = rank_file(rank)
    files = {}
    for part, pieces in (("model", state.model), ("optim", state.optimizer)):
        tensors = {piece.name: piece.tensor for piece in pieces}
        if len(tensors) < len(pieces):
            raise CheckpointError(f"{part}/{file}: two pieces have the same name, and a rank's file holds one per name")
        files[f"{part}/{file}"] = write_safetensors(root / part / file, tensors, {"format": "pt"})
    rng = f"rng/rank_{rank:05d}.json"
    files[rng] = write_file(root / rng, canonical_text(dict(state.rng)).encode())
    return RankFiles(files, index_of(state.model, file), index_of(state.optimizer, file))


def finish_folder(root: Path, state: CheckpointState, ranks: Sequence[RankFiles]) -> None:
    """Write what describes the files of all ranks, and the manifest last. Raises OSError, CheckpointError."""
    files = {name: entry for rank in ranks for name, entry in rank.files.items()}
    model = merge_indexes([rank.model for rank in ranks], "model")
    optimizer = merge_indexes([rank.optimizer for rank in ranks], "optim")
    files |= write_consolidated(root, files, model, state.weights_file, state.hf_files)
    small = {
        "model/shards.json": index_text(model),
        "optim/shards.json": index_text(optimizer),
        "config.yaml": state.config_yaml,
        "train_state.json": canonical_text(dict(state.train_state)),
        "optim/state.json": canonical_text(dict(state.optimizer_state)),
    }
    files |= {name: write_file(root / name, text.encode("utf-8")) for name, text in small.items()}
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        sync_directory(folder)
    manifest = Manifest(
        step=state.step,
        tokens=state.tokens,
        sequences_seen=state.sequences_seen,
        plan_fingerprint=state.plan_fingerprint,
        world_size=len(ranks),
        threads=torch.get_num_threads(),
        torch_version=str(torch.__version__),
        steep_version=steep.__version__,
        score=None if state.score is None or state.score != state.score else float(state.score),
        files=files,
    )
    write_file(root / MANIFEST_NAME, manifest.to_text().encode("utf-8"))
    sync_directory(root)
