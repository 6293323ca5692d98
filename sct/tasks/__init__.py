"""Define the training tasks.

Each task sets its batches, its loss, the parameters that it trains, and its evaluation.
"""
