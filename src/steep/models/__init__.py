"""Load, build and describe causal language models."""
