"""Compute or read gene features: one vector per gene, from a text model or from a file."""
