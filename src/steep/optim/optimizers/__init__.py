"""Optimizers, one file each; the name of the file is `optimizer.name`."""
