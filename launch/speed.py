"""Measure the speed of a configuration on this machine, and compare it with the machine's limit.

    python -m launch.speed --config=configs/sct_sc.py --mode=train --output=speed.json

`--help` lists all flags; see also `sct.commands.speed`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("speed")
