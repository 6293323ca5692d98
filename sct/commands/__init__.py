"""Command-line programs: `python -m launch.NAME` and `sct NAME` are the same one."""
