"""Benchmarks of pretrained models, including those that fine-tune the model first."""
