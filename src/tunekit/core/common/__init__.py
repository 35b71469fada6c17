"""What is needed everywhere."""
