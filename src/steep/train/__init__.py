"""The run: sizes, step, state, loop."""
