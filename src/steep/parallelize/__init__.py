"""Transforms that a model goes through before training."""
