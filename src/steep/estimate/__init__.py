"""What a run will take, before it runs: sizes, memory, time."""
