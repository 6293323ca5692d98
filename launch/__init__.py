"""Programs of this project: `python -m launch.train`, `python -m launch.ingest`, ...

Each file holds flags and one call into `sct`; the `sct` command makes the same calls.
"""
