"""Which tokens make sequence i: integers only, no torch, no text."""
