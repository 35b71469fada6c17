"""Built-in adapters, one a file."""
