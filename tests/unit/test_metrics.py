"""The table of metrics: complete, documented, and combined over ranks as it says."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from steep.metrics import EVALUATE_METRICS, METRICS, TRAIN_METRICS, bits_per_byte, reference_markdown
from steep.training.meter import expert_metrics

TRAIN_KEYS = "step loss grad_norm loss_scale learning_rate tokens_per_second tokens sequences mfu memory_bytes data_wait_seconds step_seconds eta_seconds forecast_loss forecast_low forecast_high balance_loss expert_load_max expert_load_min expert_entropy time"  # noqa: E501


def test_the_table_holds_the_agreed_keys() -> None:
    assert [metric.name for metric in TRAIN_METRICS] == TRAIN_KEYS.split()
    assert [metric.name for metric in EVALUATE_METRICS] == ["nats_per_token", "perplexity", "bits_per_byte"]
    assert list(METRICS) == [metric.name for metric in (*TRAIN_METRICS, *EVALUATE_METRICS)]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("loss", 2.9131, "loss 2.913"),
        ("loss", 10.8249, "loss 10.82"),
        ("grad_norm", 1.2142, "grad 1.21"),
        ("grad_norm", 12.142, "grad 12.1"),
        ("grad_norm", 99.96, "grad 100"),
        ("grad_norm", 0.0512, "grad 0.051"),
        ("grad_norm", 5e-5, "grad 5e-05"),
        ("grad_norm", 38312.0, "grad 3.8e+04"),
        ("learning_rate", 4.9e-5, "lr 4.9e-05"),
        ("tokens_per_second", 812.4, "812 tok/s"),
        ("tokens_per_second", 0.44, "0.4 tok/s"),
        ("tokens", 24576, "24.6k tokens"),
        ("mfu", 0.412, "MFU 41.2%"),
        ("mfu", None, "MFU –"),
        ("memory_bytes", 1.9 * 2**30, "1.9 GiB"),
        ("data_wait_seconds", 0.04, "data 0.0 s"),
        ("eta_seconds", 80, "ETA 1 min 20 s"),
        ("loss", math.nan, "loss nan"),
        ("loss", math.inf, "loss inf"),
        ("perplexity", 999.999, "perplexity 1,000"),
    ],
)
def test_a_value_is_shown_as_people_read_it(name: str, value: float | None, shown: str) -> None:
    assert METRICS[name].show(value) == shown


def test_bits_per_byte_of_a_hand_computed_case() -> None:
    assert bits_per_byte(math.log(2) * 16, text_bytes=8) == pytest.approx(2.0)  # 16 bits for 8 bytes


def test_the_reference_page_names_every_metric_with_its_meaning() -> None:
    page = reference_markdown()
    for metric in METRICS.values():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{metric.name}` |")]
        assert row.count("|") == 6
        assert metric.meaning in row


def test_metrics_and_trackers_do_not_import_torch() -> None:
    code = (
        "import sys, steep.metrics, steep.core.progress; from steep.trackers.backends import console, jsonl, tensorboard; "
        "heavy = {'torch', 'rich', 'matplotlib', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_expert_is_used_evenly():
    """HunYuan's smallest mixture has one; the logarithm of one is no divisor."""
    metrics = expert_metrics([1.0], [[1.0]], step=0)
    assert (metrics["expert_entropy"], metrics["expert_load_max"]) == (1.0, 1.0)
