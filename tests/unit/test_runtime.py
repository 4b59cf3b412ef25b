"""What the machine offers, and secrets that stay where they are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from steep.config.redact import redact_arguments
from steep.core.errors import ConfigError
from steep.core.files import write_json
from steep.runtime.cpu_speed import QUIET_RATIO, CpuSpeed, cpu_speed, measure_cpu_speed, speed_file
from steep.runtime.device import (
    available_cores,
    choose_device,
    cpu_quota,
    default_threads,
    peak_flops,
    peak_resident_bytes,
)
from steep.runtime.precision import choose_precision


def test_unknown_precision_and_device_are_refused() -> None:
    with pytest.raises(ConfigError, match="fp16.*mixed_bf16"):
        choose_precision("fp16", "cpu")
    with pytest.raises(ConfigError, match="finds 0 CUDA devices|no device"):
        choose_device("cuda:99")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("2,1", 2), ("", None), ("many", None), ("0", None)])
def test_omp_num_threads_is_the_default_number_of_threads(
    asked: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads() == (threads or available_cores())


def test_a_containers_quota_limits_the_threads(tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    for text, cpus in (("max 100000", None), ("150000 100000", 2), ("100000 100000", 1), ("", None)):
        limit.write_text(text)
        assert cpu_quota(limit) == cpus
    assert cpu_quota(tmp_path / "absent") is None


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the speed of this CPU with one thread is remembered."""
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path))
    path = speed_file(1)
    path.parent.mkdir()
    return path


def test_auto_is_what_was_measured_to_be_faster(remembered: Path) -> None:
    for bf16, chosen in ((2e10, "mixed_bf16"), (1.05e10, "fp32"), (5e9, "fp32"), (None, "fp32")):
        write_json(remembered, {"time": time.time(), "fp32_flops": 1e10, "bf16_flops": bf16})
        said: list[str] = []
        assert choose_precision("auto", "cpu", threads=1, say=said.append) == chosen
        assert len(said) == 1
        assert "10 GFLOP/s in fp32" in said[0]
        assert "1 thread" in said[0]
        assert choose_precision("mixed_fp16", "cpu", threads=1, say=said.append) == "mixed_fp16"
        assert len(said) == 1


def test_an_old_or_damaged_measurement_is_made_again(remembered: Path) -> None:
    write_json(remembered, {"time": time.time() - 90_000, "fp32_flops": 1.0, "bf16_flops": None})
    assert cpu_speed(1).fp32_flops > 1e8
    remembered.write_text("{")
    assert cpu_speed(1).fp32_flops > 1e8


@pytest.mark.parametrize(("cpu_ratio", "is_kept"), [(0.99, True), (0.4, False)])
def test_what_a_busy_machine_measured_is_said_and_not_remembered(
    cpu_ratio: float, is_kept: bool, remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = CpuSpeed(1, 2e10, 4e10, cpu_ratio)
    monkeypatch.setattr("steep.runtime.cpu_speed._measured", lambda _: measured)
    assert cpu_speed(1) == measured
    assert remembered.is_file() == is_kept
    assert ("other processes took 60% of the CPU" in str(measured)) != is_kept


def test_a_measurement_leaves_the_process_as_it_was() -> None:
    before = torch.get_rng_state(), torch.get_num_threads()
    assert measure_cpu_speed(1, seconds=0.05).threads == 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binding a process to a core is Linux's")
def test_cpu_time_is_what_the_threads_had() -> None:
    """Two processes bound to one core have half of it each."""
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}])\n"
    measure = f"{code}from steep.runtime.cpu_speed import measure_cpu_speed as m; print(m(1, 1.0).cpu_ratio)"
    busy = subprocess.Popen([sys.executable, "-c", f"{code}while True: pass"])
    try:
        shared = float(
            subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, check=True).stdout
        )
    finally:
        busy.kill()
        busy.wait()
    assert 0.05 < shared < QUIET_RATIO


def test_a_measurement_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("steep.runtime.cpu_speed._measured", lambda _: CpuSpeed(1, 2e10, 4e10))
    said: list[str] = []
    assert cpu_speed(1, said.append).threads == 1
    assert len(said) == 1
    assert "cannot be written" in said[0]


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
