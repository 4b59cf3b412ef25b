"""Load an export in a new process with the program that will use it, and compare.

`python -m steep.export.verify FOLDER` runs there: it loads the folder with transformers alone, reads token ids as JSON from
standard input and writes logits to a .npy file. `verify_export` runs here and compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from steep.core.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest difference of logits, as a share of their standard deviation. Same weights, same kernels: only the order of sums
may differ, which costs a few units of the last place of the dtype (2**-23, 2**-8, 2**-11) over some tens of layers."""


@dataclass(frozen=True)
class Verification:
    """What the other process found."""

    program: str
    largest_logit_difference: float
    nats_per_token: float


def nats_per_token(logits_TV: NDArray[np.float32], input_ids: list[int]) -> float:
    """Mean loss of the tokens after the first. logits_TV: (tokens, vocabulary) fp32."""
    logits = logits_TV[:-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    picked = logits[np.arange(len(logits)), input_ids[1:]]
    return float((np.log(np.exp(logits).sum(axis=-1)) - picked).mean())


def verify_export(folder: Path, input_ids: list[int], expected_TV: NDArray[np.float32], dtype: str) -> Verification:
    """Compare the exported model's logits with the expected ones. Raises ModelError with the numbers if they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "logits.npy"
        command = [sys.executable, "-m", "steep.export.verify", str(folder), str(result)]
        done = subprocess.run(command, input=json.dumps(input_ids), capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"the export {folder} does not load in a new process: {reason}")
        logits_TV = np.load(result, allow_pickle=False)
        program = done.stdout.strip().splitlines()[-1]
    if logits_TV.shape != expected_TV.shape:
        raise ModelError(
            f"the export {folder} gives logits of shape {logits_TV.shape}, the trained model {expected_TV.shape}"
        )
    difference = float(np.abs(logits_TV - expected_TV).max())
    allowed = TOLERANCE[dtype] * float(expected_TV.std())
    if not difference <= allowed:
        raise ModelError(
            f"the export {folder} is not the trained model: its logits differ by up to {difference:.3g}, and {dtype} allows "
            f"{allowed:.3g}. The folder is kept until the next export; do not serve it."
        )
    return Verification(program, difference, nats_per_token(logits_TV, input_ids))


def _logits_of_folder(folder: str, result: str) -> None:
    """The other process: transformers alone."""
    import torch
    import transformers

    input_ids = json.load(sys.stdin)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model.eval()
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([input_ids]), use_cache=False).logits[0].float().numpy()
    np.save(result, logits_TV, allow_pickle=False)
    print(f"transformers {transformers.__version__}")


if __name__ == "__main__":
    _logits_of_folder(sys.argv[1], sys.argv[2])
