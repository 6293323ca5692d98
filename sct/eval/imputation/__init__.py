"""Evaluation of imputation: masks, baselines, protocols and metrics."""
