"""Check the installation: versions, devices, memory, caches and extras.

    python -m launch.doctor

`--help` lists all flags; see also `sct.commands.doctor`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("doctor")
