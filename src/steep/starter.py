"""`steep init` and `steep config`: the run file that a person starts from. In: a model and texts. Out: commented YAML.

Main choice: a few keys with their reasons, in the order in which one thinks of them; all others have defaults, which `steep plan`
and the schema show.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from steep.config.checks import data_paths_exist, model_files_exist
from steep.config.load import load_run_config
from steep.config.schema import json_schema
from steep.config.sections import checked_section
from steep.config.yaml_file import parse_yaml
from steep.core.errors import ConfigError, DataError, ModelError
from steep.core.files import read_object, write_text
from steep.core.public import Readable, public
from steep.core.units import format_bytes, format_count
from steep.models.families import Settings, family_of, known_model, parameters_of, settings_for
from steep.models.reference import resolve_reference
from steep.sources.config import SourceConfig
from steep.sources.document import Rejected, advice_for, needs_writing
from steep.sources.files import compression_of
from steep.sources.inputs import expand_inputs, is_hub, load_format
from steep.store.reader import is_store

PathLike = Union[str, os.PathLike[str]]
SCHEMA_FILE = "steep.schema.json"
EXAMPLE_TEXT = "corpus/*.jsonl"
BYTES_PER_TOKEN, EXPANSION = 4, 4
"""Rough figures, for the batch size of little text: of English text, and of compressed files."""
LEAST_STEPS = 50
BYTES_PER_PARAMETER = 16
"""Of a whole model in training: fp32 weight and gradient, and the two moments of AdamW."""


@dataclass(frozen=True, repr=False)
class InitResult(Readable):
    """The files that were written."""

    path: Path
    schema: Path

    def to_text(self) -> str:
        """For people."""
        return f"wrote {self.path} and {self.schema}, for editors to check it against\nnext: steep plan {self.path}"


@public
def init(texts: Union[PathLike, Sequence[PathLike]], model: str, *, out: PathLike = "run.yaml") -> InitResult:
    """Write a commented run file for continued pretraining of a model on texts, which `steep plan` accepts.

    texts: files, folders, globs or token stores. model: hub id, folder, run or .gguf file; nothing of it is loaded.
    out: the run file; the JSON Schema that editors check it with is written beside it as steep.schema.json.
    Raises ConfigError if `out` exists or a name is wrong, DataError for texts that cannot be read.
    """
    path = Path(out)
    if path.exists():
        raise ConfigError(f"{path} already exists; give another name with --out, or remove it")
    named = [os.fspath(text) for text in ([texts] if isinstance(texts, (str, os.PathLike)) else texts)]
    for problem in data_paths_exist({"data": {"train": [{"path": named}]}}):
        raise DataError(problem.message)
    for problem in model_files_exist({"model": {"pretrained": model}}):
        raise ModelError(problem.message)
    head = f"# yaml-language-server: $schema=./{SCHEMA_FILE}\n"
    written = head + _run_file(_facts(model), _texts(named), str(path))
    load_run_config(mapping=parse_yaml(written).data)  # a wrong model is said before anything is written
    schema = path.with_name(SCHEMA_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(schema, json.dumps(json_schema(), indent=2) + "\n")
    write_text(path, written)
    return InitResult(path, schema)


@public
def ready_config(model: str) -> str:
    """The text of a run file with settings that suit a model of a known family, for continued pretraining.

    model: the id of any model of the family, or its name (`smollm2`, `qwen3`), which stands for its smallest model.
    Raises ConfigError, with the families, for a model that is in none.
    """
    return _run_file(_facts(known_model(model)[0]), _Texts([EXAMPLE_TEXT]), "run.yaml")


@dataclass(frozen=True)
class _Model:
    """What is known of a model without loading it."""

    reference: str
    parameters: Optional[float]
    context_tokens: Optional[int]
    """Positions; None where they are not known."""


def _facts(model: str) -> _Model:
    """From the model's name, and from config.json and the size of the weights where it is a folder. Raises ModelError."""
    path, family, parameters = resolve_reference(model), family_of(model), parameters_of(model)
    positions = family.context_tokens if family is not None else None
    if path is None or not (path / "config.json").is_file():
        return _Model(model, parameters, positions)
    config = read_object(path / "config.json")
    bytes_per_weight = 4 if "32" in str(config.get("dtype", config.get("torch_dtype"))) else 2
    weights_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for key in ("max_position_embeddings", "n_positions"):
        positions = config[key] if isinstance(config.get(key), int) else positions
    return _Model(model, parameters or weights_bytes / bytes_per_weight or None, positions)


@dataclass(frozen=True)
class _Texts:
    """The texts of a run, as far as a look at them tells."""

    paths: Sequence[str]
    text_key: Optional[str] = None
    """The field that holds the text, if it is not a usual one."""
    about_tokens: Optional[float] = None


def _texts(paths: Sequence[str]) -> _Texts:
    """Looks at the files' sizes and the first record. Raises DataError for files of no known kind, and for chats."""
    if any(is_hub(path) for path in paths) or is_store(Path(paths[0])):
        return _Texts(paths)
    source = checked_section(SourceConfig, {"path": list(paths)})
    files = expand_inputs(source)
    text_bytes = sum(file.path.stat().st_size * (EXPANSION if compression_of(file.path) else 1) for file in files)
    first = next(iter(load_format(files[0].format).read(files[0].path, source)), None)
    key = first.other_field if isinstance(first, Rejected) else ""
    if needs_writing(key):
        raise DataError(f"{files[0].path}: {advice_for(key)}")
    return _Texts(paths, key or None, text_bytes / BYTES_PER_TOKEN)


def _batch(texts: _Texts, length: int, usual: int) -> int:
    """Sequences of a step: the usual number, or a smaller power of two with which an epoch of little text has about 50 steps."""
    if texts.about_tokens is None:
        return usual
    wanted = texts.about_tokens / length / LEAST_STEPS
    return min(usual, int(2 ** int(math.log2(max(1.0, wanted)))))


def _run_file(facts: _Model, texts: _Texts, file: str) -> str:
    model, parameters, family = facts.reference, facts.parameters, family_of(facts.reference)
    settings = settings_for(parameters)
    length = min(settings.sequence_length, facts.context_tokens or settings.sequence_length)
    size = f" ({format_count(int(parameters))} parameters)" if parameters else ""
    note = f"\n# {family.name}: {family.note}." if family is not None and family.note else ""
    paths = _quoted(texts.paths[0]) if len(texts.paths) == 1 else f"[{', '.join(map(_quoted, texts.paths))}]"
    key = "" if texts.text_key is None else f"\n      text_key: {_quoted(texts.text_key)}   # the field with the text"
    batch = _batch(texts, length, settings.global_batch_size)
    return f"""\
# Continued pretraining of {model}{size}.{note}
#   steep plan {file}      sizes, tokens, steps, memory, time; no weights are loaded
#   steep lr-find {file}   measures the learning rate
#   steep train {file}     any key can be overridden: --optimizer.learning_rate {settings.learning_rate:g}

run: {{name: {_slug(model)}, directory: runs}}   # everything of this run goes to runs/{_slug(model)}
recipe: continued_pretraining   # warmup, schedule, packing, masks, clipping: steep plan prints each with its source

model:
  pretrained: {_quoted(model)}{_quantize(settings)}

data:
  sequence_length: {length}   # tokens that the model sees at once; more costs memory
  train:
    - path: {paths}{key}
    # General text, mixed in, keeps the model from forgetting: 5 % in the same language, 25 % for a new one.
    # Then give both sources a weight; path auto is text that the model writes itself.
    # - {{path: general.jsonl, weight: 0.05, role: replay}}
  validation:
    domain: {{share: 0.05}}   # a twentieth of the text is held out and scored before, during and after
    # general: {{path: general_held_out.jsonl}}   # shows what is forgotten
{_learning(settings, parameters, batch)}
evaluate:
  prompts: ["The "]   # continued before and after, to read
"""


def _quantize(settings: Settings) -> str:
    if settings.quantize is None:
        return ""
    return f"\n  quantize: {settings.quantize}   # the frozen weights in 4 bits (extra: quant)"


def _learning(settings: Settings, parameters: Optional[float], batch: int) -> str:
    """The sections that depend on the size most."""
    whole = f"{BYTES_PER_PARAMETER} bytes a parameter"
    if parameters:
        whole = f"about {format_bytes(int(parameters * BYTES_PER_PARAMETER))}"
    lines = []
    rate = f"of the whole model, which takes {whole} in training"
    if settings.adapter:
        rate = "of an adapter, ten times that of a whole model"
        lines += [
            "adapter: {type: lora}   # rank 128 on all linear layers, by the recipe. The whole model learns more and forgets",
            f"                        # more: for it remove this line, set the rate to 1e-5, and have {whole} of memory",
            "",
        ]
    lines += [
        "train:",
        "  epochs: 1",
        f"  global_batch_size: {batch}   # sequences per optimizer step; steep finds how many fit at once",
    ]
    if settings.checkpointing:
        lines.append("  activation_checkpointing: true   # less memory for a third more time; the result is the same")
    lines += ["", "optimizer:", f"  learning_rate: {settings.learning_rate:.1e}   # {rate}"]
    return "\n" + "\n".join(lines) + "\n"


def _slug(model: str) -> str:
    name = re.sub(r"\.gguf$", "", model.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.") or "run"


def _quoted(text: str) -> str:
    """Text as a YAML scalar that is safe inside brackets too."""
    return text if re.fullmatch(r"[A-Za-z_./~][\w./~*+-]*", text) and not text.endswith(":") else json.dumps(text)
