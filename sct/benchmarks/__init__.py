"""Benchmarks that train as well as measure."""
