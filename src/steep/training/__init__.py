"""A run: its model and optimizer, its steps, its state, its end."""
