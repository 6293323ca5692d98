"""Evaluation of predicted labels and pathways: metrics and baselines."""
