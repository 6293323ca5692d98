"""Benchmark pretrained models, zero-shot or after fine-tuning on a few cells."""
