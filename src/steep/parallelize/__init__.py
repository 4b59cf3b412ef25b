"""Transforms of a model before training."""
