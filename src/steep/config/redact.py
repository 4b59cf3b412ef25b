"""Mask secrets in a configuration before it is written or shown.

Masked: values equal to or containing a secret of this process's environment (HF_TOKEN, WANDB_API_KEY, MLFLOW_*,
AWS_* and every other variable with a secret's name); values under keys with such a name (api_key, password, token, but not
tokenizer, tokens or eos_token); user and password in URLs; and texts of a known form (hf_…, sk-…, ghp_…, AKIA…).
Weakness: a secret of unknown form, under an ordinary key and not in the environment, is not recognized.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
MINIMUM_LENGTH = 6
"""Environment values shorter than this are not masked: replacing them would damage ordinary text."""

_SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey", "pat"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key"),
                 ("encryption", "key"), ("signing", "key")}  # fmt: skip
_TOKEN_OWNERS = {"", "hf", "hub", "huggingface", "auth", "access", "api", "session", "bearer", "refresh", "security",
                 "github", "gitlab", "wandb", "mlflow", "user", "login", "write", "read", "id", "aws", "client",
                 "tracking", "neptune", "comet", "job", "personal"}  # fmt: skip
_HARMLESS = {"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_DEFAULT_OUTPUT",
             "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE", "AWS_PAGER", "AWS_EXECUTION_ENV",
             "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_EXPERIMENT_NAME",
             "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "MLFLOW_RUN_NAME", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}  # fmt: skip
_PLACES = ("_FILE", "_PATH", "_DIR")
_SWITCHES = {"true", "false", "disabled", "enabled", "online", "offline"}
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#]*@")
_QUERY = re.compile(
    r"([?&](?:[a-z_-]*token|api[_-]?key|password|secret|signature|sig|x-amz-[a-z-]+)=)[^&#\s]+", re.IGNORECASE
)
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{30,}|wandb_v1_[A-Za-z0-9_-]{16,})"
)


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `mapping` with every secret replaced by `***`; keys, order and everything else unchanged."""
    masked: dict[str, Any] = _redacted(mapping, _environment_secrets())
    return masked


def redact_text(text: str) -> str:
    """`text` with the environment's secrets, URL userinfo and texts of a known form masked."""
    return _redact_text(text, _environment_secrets())


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with its secrets masked: values after `--...api_key` or in `--...api_key=value`, and known secrets."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = name.startswith("--") and is_secret_key(name.rpartition(".")[2].lstrip("-"))
        shown.append(MASK if hide else f"{name}={MASK}" if secret and equals else redact_text(argument))
        hide = secret and not equals
    return shown


def is_secret_key(key: str) -> bool:
    """Whether a key's name suggests that its value is a secret."""
    words = [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()) if word]
    if any(word in _SECRET_WORDS for word in words) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words)):
        return True
    return bool(words) and words[-1] in ("token", "auth") and (words[-2] if len(words) > 1 else "") in _TOKEN_OWNERS


def _environment_secrets() -> list[str]:
    """Values of the variables that hold secrets, longest first."""
    found = set()
    for name, value in os.environ.items():
        by_prefix = name.startswith(("MLFLOW_", "AWS_")) and name not in _HARMLESS and not name.endswith(_PLACES)
        named = by_prefix or (is_secret_key(name) and not name.endswith(_PLACES))
        is_plain = value.isdigit() or value.lower() in _SWITCHES
        if named and len(value) >= MINIMUM_LENGTH and not (by_prefix and is_plain and not is_secret_key(name)):
            found.add(value)
    return sorted(found, key=len, reverse=True)


def _redacted(value: Any, secrets: list[str], hide: bool = False) -> Any:
    """hide: mask everything, as under a secret's key. Booleans and empty values are not secrets."""
    if isinstance(value, Mapping):
        return {key: _redacted(item, secrets, hide or is_secret_key(str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_redacted(item, secrets, hide) for item in value)
    if hide:
        return value if value is None or isinstance(value, bool) or value == "" else MASK
    return _redact_text(value, secrets) if isinstance(value, str) else value


def _redact_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _USERINFO.sub(rf"\g<1>{MASK}@", text)
    return _KNOWN_FORMS.sub(MASK, _QUERY.sub(rf"\g<1>{MASK}", text))
