"""Train a model, or resume a run.

    python -m launch.train --config=configs/sct_sc.py:quickstart --workdir=runs/quickstart
    python -m launch.train --config=configs/sct_sc.py --config.data.store=STORE

`--help` lists all flags; see also `sct.commands.train`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("train")
