"""Evaluate imputation: masks, baselines, protocols and metrics."""
