"""Train models: the training loop and its state, step, optimizer, sharding, checkpoints and logging."""
