"""Evaluate models: metrics, baselines, evaluation protocols and reports."""
