"""What a run settled when it began and keeps. In: the configuration that it saved. Out: the one to go on with.

A configuration may leave values open that a run then fixes, and a later version may choose otherwise. The saved configuration
holds what was chosen, so a run that is resumed, lengthened or evaluated goes by it.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from steep.config.run import RunConfig
from steep.config.yaml_file import parse_yaml
from steep.core.files import damaged
from steep.core.say import Say


def parse_saved(text: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain values of a configuration that a run saved. text: YAML. Raises DamagedFileError, which names `path`."""
    parsed = parse_yaml(text)
    if parsed.problems:
        line, _, message = parsed.problems[0]
        raise damaged(path, f"line {line}: {message}")
    if not isinstance(parsed.data, dict):
        raise damaged(path, "it does not hold the sections of a configuration")
    return parsed.data


def as_saved(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the keys that it lacks as the version that saved it would have them."""
    saved = copy.deepcopy(saved)
    for text in ((saved.get("data") or {}).get("validation") or {}).values():
        if isinstance(text, dict):  # before that key, documents were all that a share was of
            text.setdefault("share_of", "tokens" if text.get("share") is None else "documents")
    return saved


def keep_settled(config: RunConfig, saved: dict[str, Any], say: Say) -> RunConfig:
    """The configuration of a run that goes on, with what it settled at its start.

    saved: from `as_saved`. say: told of what differs from the configuration that is given.
    """
    texts = dict(config.data.validation)
    for name, then in ((saved.get("data") or {}).get("validation") or {}).items():
        now = texts.get(name)
        if now is None or now.share is None or then.get("share") is None or now.share_of == then["share_of"]:
            continue
        texts[name] = now.model_copy(update={"share_of": then["share_of"]})
        say(f"data.validation.{name}: keeps share_of: {then['share_of']}, with which the run began")
    return config.model_copy(update={"data": config.data.model_copy(update={"validation": texts})})
