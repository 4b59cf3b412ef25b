"""A model answers: in the terminal, or over HTTP by a server that is installed."""
