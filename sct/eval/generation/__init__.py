"""Evaluate generated cells and texts by metrics, and report the results."""
