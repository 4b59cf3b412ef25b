"""Formats of export, one file each; the name of the file is what `--to` takes."""
