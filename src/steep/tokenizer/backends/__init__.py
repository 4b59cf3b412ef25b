"""Ways to turn text into ids, one file per backend; the file's name is the backend's.

Each file has `build(tokenizer) -> TextEncoder` and `PACKAGE`, the package it needs. `huggingface` is the reference:
another backend is used only where `steep.tokenizer.backend_choice` has found its ids equal to the reference's.
"""
