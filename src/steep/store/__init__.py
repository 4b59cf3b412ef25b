"""Documents as integers on disk."""
