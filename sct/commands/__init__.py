"""Command-line programs. `sct NAME` and `python -m launch.NAME` run the same program."""
