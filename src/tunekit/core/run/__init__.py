"""One run: its directory, its checkpoints, its result."""
