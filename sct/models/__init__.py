"""Define the model architectures as Flax modules. `sct.models.registry` lists them by name."""
