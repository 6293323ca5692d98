"""Benchmark a model against reference baselines, on cells that it was not trained on.

    python -m launch.benchmark --config=configs/benchmark.py --config.model=runs/mine --config.data.path=cells.h5ad

`--help` lists all flags; see also `sct.commands.benchmark`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("benchmark")
