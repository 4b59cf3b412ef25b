"""Find and load a tokenizer: hub id, local folder, tokenizer.json, .gguf, token store, steep run or checkpoint.

transformers is imported inside the functions that need it; it is the reference for ids and special tokens. What comes out
for training and preparing is a TextTokenizer, which needs neither transformers nor torch.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from steep.core.errors import ConfigError, ModelError
from steep.core.files import read_json
from steep.core.section import Target
from steep.tokenizer.config import TokenizerConfig, VocabularyConfig
from steep.tokenizer.encode import BACKEND_FILE, POLICY_FILE, TextTokenizer, backend_from_file, make_text_tokenizer
from steep.tokenizer.gguf import restore_digit_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steep.models.config import ModelConfig

USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Two names of the same class: a tokenizer that is all in tokenizer.json."""
TOKENIZER_FILES = (BACKEND_FILE, "tokenizer_config.json", "tokenizer.model", "vocab.json")

logger = logging.getLogger(__name__)

__all__ = ["TextTokenizer", "load_hf_tokenizer", "load_tokenizer", "text_tokenizer", "tokenizer_reference"]


def load_tokenizer(
    config: TokenizerConfig,
    model: Union[ModelConfig, Target, None] = None,
    revision: Optional[str] = None,
    vocabulary: Optional[VocabularyConfig] = None,
) -> TextTokenizer:
    """The tokenizer of a run: `config.pretrained`, else the model's own, with new tokens, BOS and EOS as configured.

    Raises ConfigError when neither names one, ModelError when it cannot be loaded or lacks a token that is asked for.
    """
    reference = tokenizer_reference(config, model)
    own = config.pretrained is None
    revision = revision or (getattr(model, "revision", None) if own else None)
    found = load_hf_tokenizer(reference, revision)
    if vocabulary is not None:
        from steep.tokenizer.vocabulary import extend_tokenizer

        extension = extend_tokenizer(found, vocabulary)
        found = found if extension is None else extension.tokenizer
    return text_tokenizer(found, config, reference)


def tokenizer_reference(config: TokenizerConfig, model: Union[ModelConfig, Target, None] = None) -> str:
    """Which tokenizer a configuration means. Raises ConfigError when it means none."""
    if config.pretrained is not None:
        return config.pretrained
    for name in ("pretrained", "config"):
        reference = None if model is None or isinstance(model, Target) else getattr(model, name)
        if isinstance(reference, str):
            return str(Path(reference).parent) if reference.endswith("config.json") else reference
    raise ConfigError(
        "tokenizer.pretrained is needed: the model does not say which tokenizer is its own. "
        "Give a hub id, a folder, a tokenizer.json or a .gguf file."
    )


def text_tokenizer(
    hf_tokenizer: PreTrainedTokenizerBase, config: TokenizerConfig, description: str = ""
) -> TextTokenizer:
    """The light form of a transformers tokenizer. Raises ModelError for one that exists only in Python."""
    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    description = description or str(hf_tokenizer.name_or_path)
    if backend is None:
        raise ModelError(
            f"the tokenizer {description} ({type(hf_tokenizer).__name__}) exists only in Python. steep needs a fast one: "
            "convert it once with transformers (save_pretrained of a fast tokenizer writes tokenizer.json)."
        )
    prepend_bos = adds_bos(hf_tokenizer) if config.prepend_bos is None else config.prepend_bos
    return make_text_tokenizer(
        backend,
        bos_id=hf_tokenizer.bos_token_id,
        eos_id=hf_tokenizer.eos_token_id,
        append_eos=config.append_eos,
        prepend_bos=prepend_bos,
        description=description,
    )


def adds_bos(hf_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself puts BOS before a text: found by encoding one word."""
    if hf_tokenizer.bos_token_id is None:
        return False
    with_specials = hf_tokenizer("word", add_special_tokens=True)["input_ids"]
    without = hf_tokenizer("word", add_special_tokens=False)["input_ids"]
    return with_specials[:1] == [hf_tokenizer.bos_token_id] and len(with_specials) > len(without)


def load_hf_tokenizer(reference: str, revision: Optional[str] = None) -> PreTrainedTokenizerBase:
    """A transformers tokenizer from a hub id, folder, tokenizer.json, .gguf, token store, or steep run or checkpoint.

    Never runs code that comes with a model. Raises ModelError with what was tried.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    if _looks_like_path(reference):
        raise ModelError(f"{reference}: there is no such tokenizer file or folder.")
    return _auto(reference, revision=revision)


def find_tokenizer_folder(path: Path) -> Path:
    """The folder with the tokenizer's files in a model folder, token store, checkpoint or run. Raises ModelError."""
    for folder in (path, path / "tokenizer", path / "model" / "consolidated", path / "consolidated"):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for checkpoint in _newest_checkpoints(checkpoints):
        folder = checkpoint / "model" / "consolidated"
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise ModelError(
        f"{path}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}), and no checkpoint that has one."
    )


def _newest_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest step first, the one named LATEST before all."""
    found = [path for path in folder.glob("*step_*") if path.is_dir() and not path.name.startswith(".")]
    found.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], reverse=True)
    latest = folder / "LATEST"
    if latest.is_dir():
        return [latest, *found]
    if latest.is_file():
        return [folder / latest.read_text(encoding="utf-8").strip(), *found]
    return found


def _looks_like_path(reference: str) -> bool:
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1 or reference.endswith((".json", ".gguf"))


def _from_folder(path: Path) -> PreTrainedTokenizerBase:
    try:
        folder = find_tokenizer_folder(path)
    except ModelError:
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise
        return _from_file(files[0])
    if _is_plain(folder):
        from transformers import PreTrainedTokenizerFast  # what AutoTokenizer would take, after importing torch

        return _loaded(str(folder), PreTrainedTokenizerFast.from_pretrained, folder)
    if (folder / "tokenizer_config.json").is_file() or not (folder / BACKEND_FILE).is_file():
        return _auto(str(folder))
    return _from_backend_file(folder / BACKEND_FILE)


def _is_plain(folder: Path) -> bool:
    """Whether a folder's tokenizer is of no model's class and has no model beside it, which could ask for another."""
    try:
        settings = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return False  # absent or damaged: AutoTokenizer says what is wrong
    named = (
        isinstance(settings, dict) and settings.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in settings
    )
    return named and (folder / BACKEND_FILE).is_file() and not (folder / "config.json").exists()


def _from_file(path: Path) -> PreTrainedTokenizerBase:
    if path.suffix == ".gguf":
        found = path.stat()
        return copy.deepcopy(_from_gguf(path, found.st_mtime_ns, found.st_size))
    if path.name == BACKEND_FILE and (path.parent / "tokenizer_config.json").is_file():
        return _auto(str(path.parent))
    if path.suffix == ".json":
        return _from_backend_file(path)
    raise ModelError(f"{path}: is no tokenizer; a tokenizer.json or a .gguf file is needed.")


@lru_cache(maxsize=1)
def _from_gguf(path: Path, mtime_ns: int, size: int) -> PreTrainedTokenizerBase:
    """Kept for the next caller, since transformers takes some ten seconds to read it; read anew if the file has changed."""
    tokenizer = _auto(str(path.parent), gguf_file=path.name)
    restore_digit_split(tokenizer, path)
    return tokenizer


def _from_backend_file(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer.json alone; which token is which comes from steep_tokenizer.json beside it, if that is there."""
    from transformers import PreTrainedTokenizerFast

    backend = backend_from_file(path)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_tokens_beside(path, backend))


def _tokens_beside(path: Path, backend: Any) -> dict[str, str]:
    """BOS and EOS of a tokenizer.json: from the policy beside it, else EOS if just one token has an end's usual name."""
    policy_file = path.parent / POLICY_FILE
    if policy_file.is_file():
        policy = read_json(policy_file)
        ids = {"bos_token": policy.get("bos_id"), "eos_token": policy.get("eos_id")}
        return {name: backend.id_to_token(number) for name, number in ids.items() if number is not None}
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    ends = sorted(special & set(USUAL_ENDS))
    if len(ends) != 1:
        return {}
    logger.warning("%s does not name its end-of-sequence token; taking %r by its name", path, ends[0])
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
        # the library's own messages are many lines long; the first one says what happened
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{where}: the tokenizer cannot be loaded: {first_line}") from error
