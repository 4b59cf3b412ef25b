"""Turn a checkpoint into what other programs serve."""
