"""Configuration of the tokenizer."""

from __future__ import annotations

from typing import Optional

from steep.core.section import Section


class TokenizerConfig(Section):
    """Which tokenizer, and what it puts around a document."""

    pretrained: Optional[str] = None
    """Hub id, local folder, tokenizer.json or .gguf file. Default: the model's own."""
    append_eos: bool = True
    """Put the end-of-sequence token after every document, so that the model learns to stop."""
    prepend_bos: Optional[bool] = None
    """Put the beginning-of-sequence token before every document. Default: as the tokenizer itself does."""
