"""No secret leaves through the written configuration or a message: canaries in every place a secret is put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steep.config.load import load_run_config, write_config
from steep.config.redact import is_secret_key, redact, redact_text

CANARY = "canary-4f1d9b77"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_USERNAME",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "GITHUB_TOKEN",
        "MY_SERVICE_PASSWORD",
        "OPENAI_API_KEY",
    ],
)
def test_values_of_the_environment_are_masked_wherever_they_stand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, CANARY)
    found = redact({"a": [CANARY, {"b": f"before {CANARY} after"}], "c": (CANARY,), "d": 3})
    assert found == {"a": ["***", {"b": "before *** after"}], "c": ("***",), "d": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_REGION", "us-east-1"),
        ("TOKENIZERS_PARALLELISM", "false-ish"),
        ("MLFLOW_TRACKING_URI", "http://host:5000"),
        ("HF_TOKEN_PATH", "/home/me/token"),
        ("WANDB_API_KEY", "short"),
        ("MLFLOW_ENABLE_ASYNC_LOGGING", "true"),
    ],
)
def test_ordinary_values_of_the_environment_are_kept(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact({"a": f"x {value}"}) == {"a": f"x {value}"}


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "apiKey",
        "WANDB_API_KEY",
        "password",
        "db-password",
        "token",
        "hf_token",
        "auth_token",
        "secret",
        "client_secret",
        "aws_secret_access_key",
        "credentials",
        "use_auth_token",
    ],
)
def test_values_under_secret_keys_are_masked(key: str) -> None:
    assert redact({"x": {key: CANARY}}) == {"x": {key: "***"}}
    assert redact({key: [CANARY, {"inner": CANARY}]}) == {key: ["***", {"inner": "***"}]}
    assert redact({key: None}) == {key: None}
    assert redact({key: True}) == {key: True}


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "tokens",
        "eos_token",
        "pad_token",
        "bos_token_id",
        "sample_tokens",
        "text_key",
        "append_eos",
        "max_new_tokens",
        "key",
        "author",
        "pattern",
        "path",
    ],
)
def test_other_keys_are_kept(key: str) -> None:
    assert not is_secret_key(key)
    assert redact({key: "value"}) == {key: "value"}


def test_texts_that_are_secrets_by_their_form() -> None:
    assert redact_text("http://me:pa55@host:5000/x?a=1&api_key=zzz&b=2") == "http://***@host:5000/x?a=1&api_key=***&b=2"
    assert redact_text("postgresql+psycopg2://user:p%40ss@db/mlflow") == "postgresql+psycopg2://***@db/mlflow"
    assert redact_text("token hf_" + "a1B2" * 8 + " used") == "token *** used"
    assert redact_text("AKIA" + "A1B2" * 4) == "***"
    assert redact_text("me@example.org and https://host/a@b") == "me@example.org and https://host/a@b"


def test_no_key_of_the_configuration_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    config = load_run_config(mapping={"model": {"pretrained": "a/b"}, "data": {"train": [{"path": "a.txt"}]}})
    assert redact(config.to_mapping()) == config.to_mapping()


def test_the_written_file_holds_no_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-environment")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    mapping: dict[str, Any] = {
        "model": {"_target_": "my_pkg.build", "token": "canary-argument", "url": "https://u:canary-url@host/m"},
        "data": {"train": [{"path": "a.txt"}]},
        "trackers": [{"name": "jsonl", "api_key": "canary-tracker", "uri": "x canary-environment y"}],
    }
    monkeypatch.setattr("steep.config.load.CROSS_CHECKS", ())  # which trackers exist is not what is tested here
    write_config(load_run_config(mapping=mapping), "config.yaml")
    written = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert "canary" not in written
    assert written.count("***") == 4
