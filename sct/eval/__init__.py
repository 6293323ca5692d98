"""Metrics, baselines, protocols and reports."""
