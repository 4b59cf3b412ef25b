"""Find and load a transformers tokenizer: hub id, local folder, tokenizer.json, .gguf, token store, steep run or checkpoint.

transformers is imported inside the functions that need it; it is the reference for ids and special tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from steep.core.errors import ModelError, first_line
from steep.core.files import read_json, read_object
from steep.core.gguf_metadata import read_string_field, require_gguf
from steep.core.hub import cached_folder
from steep.core.say import Say, tell
from steep.runtime.run_directory import read_latest
from steep.tokenizer.encode import BACKEND_FILE, POLICY_FILE, backend_from_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Two names of the same class: a tokenizer that is entirely in tokenizer.json."""
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Values of `tokenizer.ggml.pre` whose first expression in llama.cpp's `llama-vocab.cpp` is \\p{N}."""
TOKENIZER_FILES = (BACKEND_FILE, "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_hf_tokenizer(reference: str, revision: Optional[str] = None, say: Say = tell) -> PreTrainedTokenizerBase:
    """A transformers tokenizer from a hub id, folder, tokenizer.json, .gguf, token store, or steep run or checkpoint.

    say: told of an end-of-sequence token that had to be guessed. Never runs code that comes with a model. Raises ModelError.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _from_folder(path, say)
    if path.is_file():
        return _from_file(path, say)
    like_a_path = reference.startswith((".", "/", "~")) or reference.endswith((".json", ".gguf"))
    if like_a_path or reference.count("/") > 1:
        raise ModelError(f"{reference}: there is no such tokenizer file or folder.")
    folder = cached_folder(reference, revision, TOKENIZER_FILES)
    return _auto(reference, revision=revision) if folder is None else _from_folder(folder, say)


def find_tokenizer_folder(path: Path) -> Path:
    """The folder with the tokenizer's files in a model folder, token store, checkpoint or run. Raises ModelError."""
    checkpoints = _newest_checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    parts = ("model/consolidated", "consolidated")
    places = [path, path / "tokenizer", *(path / part for part in parts), *(step / parts[0] for step in checkpoints)]
    for folder in places:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise ModelError(
        f"{path}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}), and no checkpoint that has one."
    )


def _newest_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest step first; the one that LATEST names comes before all."""
    found = [path for path in folder.glob("*step_*") if path.is_dir() and not path.name.startswith(".")]
    found.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], reverse=True)
    latest = read_latest(folder)
    return found if latest is None else [folder / latest, *found]


def _from_folder(path: Path, say: Say) -> PreTrainedTokenizerBase:
    try:
        folder = find_tokenizer_folder(path)
    except ModelError:
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise
        return _from_file(files[0], say)
    if _is_plain(folder):
        from transformers import PreTrainedTokenizerFast  # what AutoTokenizer would take, after importing torch

        return _loaded(str(folder), PreTrainedTokenizerFast.from_pretrained, folder)
    if (folder / "tokenizer_config.json").is_file() or not (folder / BACKEND_FILE).is_file():
        return _auto(str(folder))
    return _from_backend_file(folder / BACKEND_FILE, say)


def _is_plain(folder: Path) -> bool:
    """Whether a folder's tokenizer has no class of its own and no model beside it that could ask for another."""
    try:
        settings = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return False  # absent or damaged: AutoTokenizer says what is wrong
    named = (
        isinstance(settings, dict) and settings.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in settings
    )
    return named and (folder / BACKEND_FILE).is_file() and not (folder / "config.json").exists()


def _from_file(path: Path, say: Say) -> PreTrainedTokenizerBase:
    if path.suffix == ".gguf":
        require_gguf(f"reading the tokenizer of {path.name}")
        found = path.stat()
        return copy.deepcopy(_from_gguf(path, found.st_mtime_ns, found.st_size))
    if path.name == BACKEND_FILE and (path.parent / "tokenizer_config.json").is_file():
        return _auto(str(path.parent))
    if path.suffix == ".json":
        return _from_backend_file(path, say)
    raise ModelError(f"{path}: is not a tokenizer; a tokenizer.json or a .gguf file is needed.")


@lru_cache(maxsize=1)
def _from_gguf(path: Path, mtime_ns: int, size: int) -> PreTrainedTokenizerBase:
    """Kept for the next caller, since reading it takes a second; read again if the file has changed."""
    kind = _class_for_gguf(path)
    if kind is None:
        tokenizer = _auto(str(path.parent), gguf_file=path.name)
    else:
        tokenizer = _loaded(str(path), kind.from_pretrained, str(path.parent), gguf_file=path.name)
    _restore_digit_split(tokenizer, path)
    return tokenizer


def _class_for_gguf(path: Path) -> Any:
    """The class that AutoTokenizer takes for a .gguf file; None where the architecture that the file names does not tell.

    AutoTokenizer reads the configuration of the model to choose it, string by string with the package gguf: four seconds, for a
    class that follows from the model type.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    architecture = read_string_field(path, "general.architecture")
    if architecture not in CONFIG_MAPPING or (path.parent / "tokenizer_config.json").exists():
        return None
    name = TOKENIZER_MAPPING_NAMES.get(architecture) or PLAIN_CLASSES[0]
    return None if name == "MistralCommonBackend" else tokenizer_class_from_name(name)


def _restore_digit_split(hf_tokenizer: Any, path: Path) -> None:
    """Make the tokenizer of a .gguf split digits one by one if the file says so; say it.

    transformers 5.23 knows many values of `tokenizer.ggml.pre`, but not those whose vocabularies split digits one by one (SmolLM2
    among them): "  1" then gets other ids than in the model's training and in llama.cpp.
    """
    from tokenizers import pre_tokenizers

    kind = read_string_field(path, "tokenizer.ggml.pre")
    backend = hf_tokenizer.backend_tokenizer
    present = json.loads(backend.to_str())["pre_tokenizer"]
    if kind not in SINGLE_DIGITS or present is None or "Digits" in json.dumps(present):
        return
    # not a caller's `say`: the result is for all callers
    tell(f"{path.name}: digits are split one by one (tokenizer.ggml.pre is {kind!r}), which transformers leaves out")
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _from_backend_file(path: Path, say: Say) -> PreTrainedTokenizerBase:
    """A tokenizer.json alone; its BOS and EOS come from steep_tokenizer.json beside it, if that exists."""
    from transformers import PreTrainedTokenizerFast

    backend = backend_from_file(path)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_tokens_beside(path, backend, say))


def _tokens_beside(path: Path, backend: Any, say: Say) -> dict[str, str]:
    """BOS and EOS of a tokenizer.json: from the policy beside it, else EOS if exactly one token has a usual name."""
    policy_file = path.parent / POLICY_FILE
    if policy_file.is_file():
        policy = read_object(policy_file)
        ids = {"bos_token": policy.get("bos_id"), "eos_token": policy.get("eos_id")}
        return {name: backend.id_to_token(number) for name, number in ids.items() if number is not None}
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    ends = sorted(special & set(USUAL_ENDS))
    if len(ends) != 1:
        return {}
    say(f"{path} does not name its end-of-sequence token; taking {ends[0]!r} by its name")
    return {"eos_token": ends[0]}


def _auto(reference: str, **arguments: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    arguments = {key: value for key, value in arguments.items() if value is not None}
    where = f"{reference}/{arguments['gguf_file']}" if "gguf_file" in arguments else reference
    return _loaded(where, AutoTokenizer.from_pretrained, reference, trust_remote_code=False, **arguments)


def _loaded(
    where: str, load: Callable[..., PreTrainedTokenizerBase], *given: Any, **named: Any
) -> PreTrainedTokenizerBase:
    try:
        return load(*given, **named)
    except Exception as error:
        raise ModelError(f"{where}: the tokenizer cannot be loaded: {first_line(error)}") from error
