"""Diagnostics of a network: attention maps are recorded and rescaled, operations and memory are counted."""
