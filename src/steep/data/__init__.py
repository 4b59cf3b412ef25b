"""The texts and token stores of a run, opened."""
