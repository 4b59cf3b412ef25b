"""Formats of token files, one file each; the name of the file is the `format` of a source of tokens."""
