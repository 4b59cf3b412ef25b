"""Held-out scores and generated text."""
