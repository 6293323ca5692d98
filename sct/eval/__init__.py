"""Metrics, baselines, evaluation protocols and reports."""
