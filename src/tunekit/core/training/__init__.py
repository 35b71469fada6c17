"""The loss of some rows, and the processes that share them."""
