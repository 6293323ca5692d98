"""Evaluation of cell embeddings: metrics and baselines."""
