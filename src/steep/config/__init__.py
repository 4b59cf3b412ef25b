"""Assembles the sections into one RunConfig, reads files and overrides, resolves targets."""
