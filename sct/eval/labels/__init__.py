"""Predicted labels and pathways: measures and baselines."""
