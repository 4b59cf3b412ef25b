"""The forgetting report by hand: gain, loss, ratio, roles, and what the verdict says at every threshold."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from steep.core.errors import ConfigError
from steep.evaluation.forgetting import forgetting_report, role_of


def scores(**texts: tuple[float, float]) -> dict[str, Any]:
    return {
        text: {"before": {"bits_per_byte": before}, "after": {"bits_per_byte": after}}
        for text, (before, after) in texts.items()
    }


def test_gain_loss_and_ratio_by_hand() -> None:
    report = forgetting_report(scores(general=(0.8, 0.812), manuals=(1.0, 0.9), letters=(2.0, 1.8)))
    assert [change.text for change in report.changes] == ["manuals", "letters", "general"]
    assert report.gain == pytest.approx(0.15)  # the mean of 0.1 and 0.2
    assert report.gain_ratio == pytest.approx(0.1)  # of a mean base of 1.5
    assert report.loss == pytest.approx(0.012)
    assert report.loss_ratio == pytest.approx(0.015)
    assert report.loss_per_gain == pytest.approx(0.08)
    assert report.verdict == "kept"
    assert report.headline == "learned the texts manuals and letters and forgot little of the general text"
    assert report.verdict_sentence.startswith("under the cap: general changed by +1.50 %, within the cap of 2.00 %")


@pytest.mark.parametrize(
    ("after", "verdict", "kept"),
    [
        (0.90, "kept", "forgot none of the general text"),
        (1.005, "kept", "forgot none of the general text"),  # half a per cent is still nothing
        (1.0051, "kept", "forgot little of the general text"),
        (1.02, "kept", "forgot little of the general text"),  # at the cap is under it
        (1.0201, "forgot", "forgot some of the general text"),
    ],
)
def test_thresholds(after: float, verdict: str, kept: str) -> None:
    report = forgetting_report(scores(general=(1.0, after)), cap_ratio=1.02 - 1.0)
    assert (report.verdict, report.kept) == (verdict, kept)


def test_the_worst_general_text_decides_and_none_hides_behind_another() -> None:
    report = forgetting_report(scores(domain=(1.0, 0.5), general=(1.0, 0.9), general_german=(1.0, 1.05)))
    assert report.loss == pytest.approx(-0.025)
    assert report.loss_per_gain == 0.0
    assert report.verdict == "forgot"
    assert report.headline == "learned the domain text but forgot some of the general_german text"
    assert "over the cap: general_german is 5.00 % worse" in report.to_text()


def test_another_cap() -> None:
    given = scores(domain=(1.0, 0.9), general=(1.0, 1.015))
    assert forgetting_report(given, cap_ratio=0.01).verdict == "forgot"
    assert forgetting_report(given, cap_ratio=0.02).verdict == "kept"


def test_without_general_text_nothing_is_claimed_and_the_remedy_is_named() -> None:
    report = forgetting_report(scores(domain=(1.0, 0.9)))
    assert (report.verdict, report.loss, report.loss_per_gain) == ("not measured", None, None)
    assert report.headline == "learned the domain text"
    assert "data.validation.general" in report.to_text()
    assert "not measured" in report.to_text()


def test_without_domain_text_the_loss_is_still_judged() -> None:
    report = forgetting_report(scores(general=(1.0, 1.1)))
    assert (report.gain, report.verdict) == (None, "forgot")
    assert report.headline == "has no domain text to show what it learned but forgot some of the general text"


def test_a_gain_of_nothing_has_no_ratio() -> None:
    assert forgetting_report(scores(domain=(1.0, 1.1), general=(1.0, 1.1))).loss_per_gain is None


def test_roles_are_as_configured_else_by_name() -> None:
    assert role_of("wiki") == ("domain", "wiki is domain text, because nothing says otherwise (role: general would)")
    assert role_of("General_web") == ("general", "General_web is general text, by its name")
    assert role_of("wiki", "general") == ("general", "wiki is general text, as configured")
    assert role_of("general", "domain")[0] == "domain"
    report = forgetting_report(scores(wiki=(1.0, 1.1), mine=(1.0, 0.9)), roles={"wiki": "general", "mine": None})
    assert [(change.text, change.role) for change in report.changes] == [("mine", "domain"), ("wiki", "general")]
    assert "roles: wiki is general text, as configured" in report.to_text()


def test_nats_per_token_where_a_text_has_no_bytes_and_texts_scored_once_are_left_out() -> None:
    given = {
        "domain": {"before": {"bits_per_byte": 1.0, "nats_per_token": 3.0},
                   "after": {"bits_per_byte": 0.9, "nats_per_token": 2.7}},
        "general": {"before": {"bits_per_byte": None, "nats_per_token": 3.0}, "after": {"nats_per_token": 3.3}},
        "late": {"before": None, "after": {"bits_per_byte": 1.0, "nats_per_token": 3.0}},
    }  # fmt: skip
    report = forgetting_report(given)
    assert report.unit == "nats per token"
    assert [(change.text, change.trained) for change in report.changes] == [("domain", 2.7), ("general", 3.3)]


def parted(before: list[float], after: list[float]) -> dict[str, Any]:
    """A text with the nats of its parts; its scores are their sums."""
    sides = {"before": before, "after": after}
    return {side: {"bits_per_byte": sum(nats), "part_nats": nats} for side, nats in sides.items()}


NOISE = np.random.default_rng(3).normal(size=64)


@pytest.mark.parametrize(
    ("change", "spread", "learned"),
    [
        (-0.10, 0.02, "learned the domain text"),
        (-0.01, 0.20, "was scored on too little text to tell whether it learned the domain text"),
        (+0.01, 0.20, "was scored on too little text to tell whether it learned the domain text"),
        (+0.10, 0.02, "got worse on the domain text"),
        (0.0, 0.001, "learned nothing measurable of the domain text"),
    ],
)
def test_learned_is_said_only_of_a_change_above_its_error(change: float, spread: float, learned: str) -> None:
    after = (1 + change + spread * (NOISE - NOISE.mean())).tolist()
    report = forgetting_report({"domain": parted([1.0] * 64, after)})
    assert report.learned == learned
    # the error of a mean of 64 equal parts: 1.96 deviations / sqrt(64)
    assert report.gain_error_ratio == pytest.approx(1.96 * spread * NOISE.std() / 8, rel=0.06)
    again = forgetting_report({"domain": parted([1.0] * 64, after)})
    assert report.to_mapping() == again.to_mapping()


def test_forgot_and_kept_are_said_only_where_the_error_allows_it() -> None:
    def verdict(change: float, spread: float) -> str:
        after = (1 + change + spread * (NOISE - NOISE.mean())).tolist()
        return forgetting_report({"general": parted([1.0] * 64, after)}).verdict

    assert verdict(0.05, 0.02) == "forgot"
    assert verdict(0.05, 0.40) == "too little text"  # over the cap, and within its error
    assert verdict(0.01, 0.20) == "too little text"  # perhaps over the cap
    assert verdict(0.01, 0.02) == "kept"
    assert verdict(-0.30, 0.40) == "kept"  # better by more than the error
    few = forgetting_report({"domain": parted([1.0] * 7, [0.5] * 7), "general": parted([1.0] * 7, [0.9] * 7)})
    assert (few.verdict, few.changes[0].error_ratio) == ("too little text", math.inf)
    assert few.headline == (
        "was scored on too little text to tell whether it learned the domain text or forgot the general text"
    )
    clear = parted([1.0] * 64, [0.9] * 64)
    assert forgetting_report({"domain": clear, "general": parted([1.0] * 7, [0.9] * 7)}).headline == (
        "learned the domain text, with too little text to tell what it forgot of the general text"
    )
    assert json.loads(json.dumps(few.to_mapping()))["texts"][0]["error_ratio"] is None


def test_a_text_that_is_certainly_forgotten_decides_before_one_that_is_unclear() -> None:
    certain = [1.03] * 64
    unclear = (1.05 + 0.5 * (NOISE - NOISE.mean())).tolist()
    report = forgetting_report({"general": parted([1.0] * 64, unclear), "general2": parted([1.0] * 64, certain)})
    assert (report.verdict, report.worst and report.worst.text) == ("forgot", "general2")


def test_no_scores_at_all() -> None:
    report = forgetting_report({})
    assert report.headline.startswith("has no verdict")
    assert "no held-out text was scored before and after" in report.to_text()


def test_the_mapping_is_json_and_holds_every_number() -> None:
    mapping = json.loads(json.dumps(forgetting_report(scores(domain=(1.0, 0.9), general=(1.0, 1.03))).to_mapping()))
    assert mapping["verdict"] == "forgot"
    assert mapping["gain_ratio"] == pytest.approx(0.1)
    assert mapping["loss_ratio"] == pytest.approx(0.03)
    assert mapping["loss_per_gain"] == pytest.approx(0.3)
    assert mapping["cap_ratio"] == 0.02
    assert mapping["texts"][1]["change_ratio"] == pytest.approx(0.03)


def test_a_role_that_is_none_is_an_error_of_the_configuration() -> None:
    from steep.config.load import as_config

    with pytest.raises(ConfigError, match="domain"):
        as_config(
            {
                "run": {"name": "r"},
                "model": {"pretrained": "m"},
                "data": {"train": [{"path": "t"}], "validation": {"x": {"path": "v", "role": "replay"}}},
                "train": {"steps": 1},
            }
        )
