"""Runs that are made elsewhere: on the machines of a Ray cluster."""
