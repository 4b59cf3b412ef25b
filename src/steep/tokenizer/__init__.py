"""Load a tokenizer and encode documents with it."""
