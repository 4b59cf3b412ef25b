"""Save, load, verify and retire checkpoints."""
