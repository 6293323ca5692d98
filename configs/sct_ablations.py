"""Train the ablations of the sCT paper (Table 4, appendix D) and four further ablations, as one sweep of runs.

The base run follows the paper's recipe, including its stratified masking. Each run in `sweep` changes only the fields
that it names. A bag is a group of cells that sCT reads together. Runs with fewer cells per bag use proportionally more
bags per step, so all runs see the same number of cells.

:quickstart uses the blood cells from scanpy. Each of the 13 runs takes 3 to 4 minutes on 2 CPU cores:

    python -m launch.train --config=configs/sct_ablations.py:quickstart --workdir=runs/ablations

:mini uses your own store:

    python -m launch.train --config=configs/sct_ablations.py:mini --config.data.store=STORE --workdir=runs/ablations

Without a variant, the sweep trains the full model. Each run has as many steps as a run of `configs/sct_sc.py`:

    python -m launch.train --config=configs/sct_ablations.py --config.data.store=STORE --workdir=runs/ablations

Runs are trained one after the other in WORKDIR/NAME, where NAME is the name of the run. WORKDIR/report.md has a table
of all runs. The same command resumes the sweep and skips finished runs. `--only=base,cells_1` selects runs. A field on
the command line (`--config.train.steps=100`, `--config.train.seed=1`) applies to all runs, except runs that set this
field in `sweep`. To change the field of one run, use the name of the run: `--config.sweep.bins_15.model.num_bins=20`.

The paper reports these MCC values:

- base: 0.48
- uniform masking: 0.34
- 5% of unexpressed genes masked: 0.45
- standard layer norm: 0.39
- no norm: 0.40
- bags of 1 cell: 0.07
- bags of 10 cells: 0.44
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

VARIANTS = ("", "mini", "quickstart")

_SINGLE_CELL = runpy.run_path(str(Path(__file__).with_name("sct_sc.py")))

# The paper compares bags of 50 cells with bags of 10 cells and 1 cell. Instead of 10 cells, the small variants use a
# fourth of the cells of their base run.
_FEW_CELLS = {"": 10, "mini": 2, "quickstart": 4}


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the base run. The section `sweep` contains the changes of each run."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = _SINGLE_CELL["get_config"](variant)
    # The small variants of sct_sc.py train with a mixture of maskings. Here only the run `masking_mixture` does.
    config.objective.masking.update(
        kind="stratified", expressed=0.15, unexpressed=0.01, low=0.05, high=0.5, mixture=()
    )
    config.objective.logit_adjustment = False  # the paper's loss; only the run `logit_adjustment` changes it
    mixture = {"kind": "mixture", "mixture": _SINGLE_CELL["MIXTURE"]}

    few = _FEW_CELLS[variant]
    config.sweep = ConfigDict(
        {
            "masking_uniform": {"objective": {"masking": {"kind": "uniform"}}},
            "masking_unexpressed_5": {"objective": {"masking": {"unexpressed": 0.05}}},
            "masking_drawn": {"objective": {"masking": {"kind": "drawn"}}},
            "masking_mixture": {"objective": {"masking": mixture}},
            "logit_adjustment": {"objective": {"logit_adjustment": True}},
            "norm_layer": {"model": {"norm": "layer"}},
            "norm_none": {"model": {"norm": "none"}},
            "norm_fixed": {"model": {"norm": "shared_fixed"}},
            "cells_1": {"data": {"cells_per_bag": 1}},
            f"cells_{few}": {"data": {"cells_per_bag": few}},
            "bins_15": {"model": {"num_bins": 15}},
            "pool_max": {"model": {"pool": "max"}},
        }
    )
    if config.objective.max_masked_fraction:  # these runs mask more positions
        for name, budget in (
            ("masking_uniform", 0.2),
            ("masking_unexpressed_5", 0.1),
            ("masking_drawn", 0.1),
            ("masking_mixture", 0.5),
        ):
            config.sweep[name].objective.max_masked_fraction = budget
    for name, cells in (("cells_1", 1), (f"cells_{few}", few)):
        # The values are references, so they follow values of the base run that are set on the command line.
        factor = config.data.get_ref("cells_per_bag") // cells
        for section, field in (
            ("train", "batch_size"),
            ("train", "eval_records"),
            ("objective", "report_bags"),
        ):
            run = config.sweep[name]
            if section not in run:
                run[section] = ConfigDict()
            run[section][field] = config[section].get_ref(field) * factor
    return config
