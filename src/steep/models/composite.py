"""Models of several parts: a language model with a vision tower before it, as Gemma 3, LLaVA, Qwen-VL and Idefics have.

In: a configuration or a model. Out: which class of transformers loads it, its towers frozen, the files of its processor. Main
choice: the whole model is loaded, trained in its language model alone, and written whole, so that what could see still can;
text gives the towers no gradient. Weakness: the towers take their memory although text never runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from steep.core.hub import cached_folder
from steep.core.say import Say
from steep.core.units import format_count
from steep.models.layers import input_layer, output_layer, text_config, text_part
from steep.models.reference import resolve_reference

PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json"
)  # fmt: skip
"""What AutoProcessor reads beside the tokenizer."""


def is_composite(config: Any) -> bool:
    """Whether transformers' configuration is of a language model with other parts around it that see."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return text_config(config) is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: Any) -> Any:
    """The class of transformers that loads or builds the whole model of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if is_composite(config) else AutoModelForCausalLM


def freeze_towers(model: nn.Module, say: Say) -> None:
    """Freeze what is not the language model of a composite model, and say it in one line; nothing for any other model.

    Raises nothing: a part that text does not reach has no gradient in any case.
    """
    if (line := tower_line(model)) is None:
        return
    language = _language_parameters(model)
    for parameter in model.parameters():
        if id(parameter) not in language:
            parameter.requires_grad_(False)
    say(line)


def tower_line(model: nn.Module) -> str | None:
    """The line on what is frozen in a composite model; None for any other model."""
    if not hasattr(model, "config") or not is_composite(model.config):
        return None
    language = _language_parameters(model)
    outside = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in language}
    if not outside:
        return None
    parts = dict.fromkeys(".".join(name.split(".")[:2]).removeprefix("model.") for name in outside)
    size, whole = sum(parameter.numel() for parameter in outside.values()), sum(p.numel() for p in model.parameters())
    return (
        f"frozen: {', '.join(parts)} ({format_count(size)} parameters, {size / whole:.0%} of the model): text trains "
        "only the language model; these parts are saved with it unchanged"
    )


def _language_parameters(model: nn.Module) -> set[int]:
    parts = [part for part in (text_part(model), input_layer(model), output_layer(model)) if part is not None]
    return {id(parameter) for part in parts for parameter in part.parameters()}


def processor_files(source: str, revision: str | None = None) -> dict[str, bytes]:
    """The files of a model's processor by name, from its folder or from the hub; empty without one."""
    from transformers.utils import cached_file

    path = resolve_reference(source) or cached_folder(source, revision)
    if path is not None:
        folder = path.parent if path.is_file() else path
        found = {name: folder / name for name in PROCESSOR_FILES if (folder / name).is_file()}
    else:
        cached = {
            name: cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            for name in PROCESSOR_FILES
        }
        found = {name: Path(file) for name, file in cached.items() if file is not None}
    return {name: file.read_bytes() for name, file in found.items()}
