"""Evaluate predicted labels and pathways by metrics, and compare them with baselines."""
