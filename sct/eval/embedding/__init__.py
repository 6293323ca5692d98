"""Embeddings of cells: measures and baselines."""
