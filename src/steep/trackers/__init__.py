"""Where metrics go: the console, metrics.jsonl and other trackers."""
