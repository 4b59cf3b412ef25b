"""What the machine offers, and secrets that stay where they are."""

from __future__ import annotations

import subprocess
import sys

import pytest

from steep.config.redact import redact_arguments
from steep.core.errors import ConfigError
from steep.runtime.device import choose_device, choose_precision, peak_flops, peak_resident_bytes


def test_unknown_precision_and_device_are_refused() -> None:
    with pytest.raises(ConfigError, match="fp16.*mixed_bf16"):
        choose_precision("fp16", "cpu")
    with pytest.raises(ConfigError, match="finds 0 CUDA devices|no device"):
        choose_device("cuda:99")
    assert choose_device("cpu").type == "cpu"


def test_peak_memory_is_this_process_alone() -> None:
    held = bytearray(400 * 2**20)
    code = "from steep.runtime.device import peak_resident_bytes as p; print(p())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child < 200 * 2**20 < len(held) <= peak_resident_bytes()


def test_gpu_names_are_whole_words() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA RTX A1000") is None


def test_secrets_of_a_command_line_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-in-the-environment")
    shown = redact_arguments(
        [
            "steep",
            "train",
            "run.yaml",
            "--trackers.0.api_key",
            "canary1",
            "--a.password=canary2",
            "canary-in-the-environment",
        ]
    )
    assert shown[:4] == ["steep", "train", "run.yaml", "--trackers.0.api_key"]
    assert not any("canary" in argument for argument in shown)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_waiting_threads_are_tuned_unless_the_user_did(given: dict[str, str], expected: str) -> None:
    import os

    code = "import os; from steep.runtime.tuning import tune_process; tune_process(); print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**plain, **given}
    )
    assert done.stdout.strip() == expected
