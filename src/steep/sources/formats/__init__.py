"""Formats of raw text, one file each; the name of the file is the `format` of a source."""
