"""Built-in trainers, one a file."""
