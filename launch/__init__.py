"""Programs of this project, such as `python -m launch.train` and `python -m launch.ingest`.

Each file makes one call into `sct.cli`. The `sct` command makes the same calls.
"""
