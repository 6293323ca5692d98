"""Architectures: pure functions of nested dicts of arrays; `sct.models.registry` finds them by name."""
