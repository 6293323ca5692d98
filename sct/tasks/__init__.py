"""Objectives: what is a batch, what is the loss, what is trained, how it is evaluated."""
