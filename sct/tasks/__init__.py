"""Training tasks. Each task defines its batches, its loss, the parameters that are trained, and the evaluation."""
