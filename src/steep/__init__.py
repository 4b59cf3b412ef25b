"""steep: pretrain and continue to pretrain language models, from raw text to a servable checkpoint."""

__version__ = "0.1.0"
