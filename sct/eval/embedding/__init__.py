"""Evaluate cell embeddings by metrics, and compare them with baselines."""
