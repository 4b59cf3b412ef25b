"""Device, seed, allocator, signals, environment."""
