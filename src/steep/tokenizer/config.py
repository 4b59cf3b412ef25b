"""Configuration of the tokenizer."""

from __future__ import annotations

from typing import Literal, Optional, Union

from steep.core.section import Section


class TokenizerConfig(Section):
    """Which tokenizer, and what it puts around a document."""

    pretrained: Optional[str] = None
    """Hub id, local folder, tokenizer.json or .gguf file. Default: the model's own."""
    append_eos: bool = True
    """Put the end-of-sequence token after every document, so that the model learns to stop."""
    prepend_bos: Optional[bool] = None
    """Put the beginning-of-sequence token before every document. Default: as the tokenizer itself does."""


class VocabularyConfig(Section):
    """New tokens for a pretrained model: words that its tokenizer splits into many. Their embeddings are trained."""

    add: Union[str, list[str]]
    """The tokens, or a file with one on each line, or a folder that `steep tokenizer extend` wrote."""
    initialise: Literal["mean_of_subtokens", "mean"] = "mean_of_subtokens"
    """Start value of a new embedding: the mean of the tokens that its text was split into, or of all old tokens."""
