"""Imputation of hidden expression: what is hidden, baselines, protocols and scores."""
