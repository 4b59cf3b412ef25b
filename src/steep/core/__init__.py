"""Leaf helpers: import nothing of steep outside this folder, and no heavy library."""
