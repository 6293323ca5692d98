"""Evaluation of generated cells and texts: metrics and reports."""
