"""What a run will need of memory: counted without using any."""
