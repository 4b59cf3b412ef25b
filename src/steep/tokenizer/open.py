"""The tokenizer of a run. In: the `tokenizer`, `model` and `vocabulary` sections. Out: a TextTokenizer.

Training and preparing use it alone; it needs neither transformers nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Optional, Union

from steep.core.errors import ConfigError, ModelError
from steep.core.say import Say, say_nothing, tell
from steep.core.section import Target
from steep.tokenizer.config import TokenizerConfig, VocabularyConfig
from steep.tokenizer.encode import TextTokenizer, make_text_tokenizer
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.vocabulary import extend_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steep.models.config import ModelConfig


def load_tokenizer(
    config: TokenizerConfig,
    model: Union[ModelConfig, Target, None] = None,
    revision: Optional[str] = None,
    vocabulary: Optional[VocabularyConfig] = None,
    say: Say = tell,
) -> TextTokenizer:
    """The tokenizer of a run: `config.pretrained`, else the model's own, with new tokens, BOS and EOS as configured.

    Raises ConfigError if neither names one, ModelError if it cannot be loaded or lacks a token that is needed.
    """
    reference = tokenizer_reference(config, model)
    revision = revision or (getattr(model, "revision", None) if config.pretrained is None else None)
    found = load_hf_tokenizer(reference, revision, say)
    extension = extend_tokenizer(found, vocabulary)
    return text_tokenizer(found if extension is None else extension.tokenizer, config, reference)


def tokenizer_reference(config: TokenizerConfig, model: Union[ModelConfig, Target, None] = None) -> str:
    """The reference of the tokenizer that a configuration names. Raises ConfigError if it names none."""
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
    """A transformers tokenizer as a TextTokenizer. Raises ModelError for one that exists only in Python."""
    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    description = description or str(hf_tokenizer.name_or_path)
    if backend is None:
        raise ModelError(
            f"the tokenizer {description} ({type(hf_tokenizer).__name__}) exists only in Python. steep needs a fast one: "
            "convert it once with transformers (save_pretrained of a fast tokenizer writes tokenizer.json)."
        )
    return make_text_tokenizer(
        backend,
        bos_id=hf_tokenizer.bos_token_id,
        eos_id=hf_tokenizer.eos_token_id,
        append_eos=config.append_eos,
        prepend_bos=_adds_bos(hf_tokenizer) if config.prepend_bos is None else config.prepend_bos,
        description=description,
    )


def check_read_back(files: Mapping[str, bytes], config: TokenizerConfig, tokenizer: TextTokenizer) -> None:
    """Raises ModelError if transformers would read another tokenizer from these files, which a checkpoint will hold.

    files: content by name. For some families (Qwen2, Qwen3.5) transformers takes the class of the family whatever the tokenizer's
    own files say, and its rules for splitting text with it.
    """
    with TemporaryDirectory() as folder:
        for name, data in files.items():
            if "/" not in name:
                (Path(folder) / name).write_bytes(data)
        found = load_hf_tokenizer(folder, say=say_nothing)
        if text_tokenizer(found, config).fingerprint == tokenizer.fingerprint:
            return
    raise ModelError(
        f"the tokenizer {tokenizer.description} does not go with this family of models: beside its config.json transformers "
        f"reads it as {type(found).__name__}, which gives other ids, so a resumed run and a served model would not be what was "
        "trained. "
        "Use the tokenizer of the family, or another family for this tokenizer, such as llama or qwen3"
    )


def _adds_bos(hf_tokenizer: PreTrainedTokenizerBase) -> bool:
    if hf_tokenizer.bos_token_id is None:
        return False
    with_specials = hf_tokenizer("word", add_special_tokens=True)["input_ids"]
    without = hf_tokenizer("word", add_special_tokens=False)["input_ids"]
    return with_specials[:1] == [hf_tokenizer.bos_token_id] and len(with_specials) > len(without)
