"""Scores on held-out text, forgetting, generated text."""
