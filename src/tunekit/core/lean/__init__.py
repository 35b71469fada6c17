"""The forwards of PEFT's layers while training: the same numbers, files and gradients, with less work."""
