"""Training tasks: each defines its batches, its loss, the trained parameters and the evaluation."""
