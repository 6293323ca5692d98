"""The training loop of all models, and its parts: state, step, optimizer, sharding, checkpoints, logging."""
