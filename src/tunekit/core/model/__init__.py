"""The base model and what is done with it."""
