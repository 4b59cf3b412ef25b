"""generation_config.json of a base, mended where it contradicts itself. In: a model as it was loaded. Out: one that can be saved.

transformers reads such a file with a warning and then refuses to save it, so that a run would fail at its first checkpoint and an
export at its end. What the author meant is taken where it is clear: a temperature is for sampling.
"""

from __future__ import annotations

from typing import Any

from steep.core.errors import ModelError, first_line
from steep.core.say import Say

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that only sampling reads."""
BEAMS = ("early_stopping", "length_penalty")
"""Settings that only a search with several beams reads."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def mend_generation_settings(model: Any, say: Say) -> None:
    """Make the model's generation settings such that transformers saves them, in place; `say` what was changed and why."""
    settings = getattr(model, "generation_config", None)
    if settings is None or _is_valid(settings):
        return
    changes = [*_mend_beams(settings), *_mend_sampling(settings)]
    if isinstance(settings.pad_token_id, int) and settings.pad_token_id < 0:
        changes.append(f"pad_token_id {settings.pad_token_id} removed")
        settings.pad_token_id = None
    if not _is_valid(settings):
        model.generation_config = type(settings)(**{name: getattr(settings, name) for name in TOKENS})
        changes = ["nothing but its special tokens is kept"]
    say(
        "generation_config.json contradicts itself, so that transformers would not save it; mended: "
        + "; ".join(changes)
    )


def check_generation_file(source: str, revision: str | None) -> None:
    """Raises ModelError for a generation_config.json of a folder or hub id that transformers refuses to read."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(source, revision=revision)
    except ValueError as error:
        raise ModelError(
            f"{source}: transformers refuses its generation_config.json: {first_line(error)} Correct that value, or delete "
            "the file"
        ) from error
    except OSError:  # there is none
        return


def _is_valid(settings: Any) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def _mend_beams(settings: Any) -> list[str]:
    named = [name for name in BEAMS if getattr(settings, name) not in (None, False)]
    if settings.num_beams not in (None, 1) or not named:
        return []
    for name in named:
        setattr(settings, name, None)
    return [f"{' and '.join(named)} removed, since there is one beam"]


def _mend_sampling(settings: Any) -> list[str]:
    named = [name for name in SAMPLING if getattr(settings, name) is not None]
    if settings.do_sample is True or not named:
        return []
    if settings.do_sample is None and settings.temperature != 0:
        settings.do_sample = True
        return [f"do_sample set to true, since {' and '.join(named)} mean sampling"]
    greedy = "do_sample is false" if settings.do_sample is False else "temperature 0 means the likeliest token"
    for name in named:
        setattr(settings, name, None)
    settings.do_sample = False
    return [f"{' and '.join(named)} removed, since {greedy}"]
