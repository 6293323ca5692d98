"""Train sCT on spatial data (stage 2 of the paper): a single-cell model learns to read cell coordinates as well.

A bag is a group of cells or spots that sCT reads together: here a spot and the spots nearest to it. A gene token is one
gene in one spot.

Without a variant, the full model is trained on 1.5 x 10^11 gene tokens, from the model of stage 1
(`configs/sct_sc.py`). The projection of the coordinates is new and initialized with zeros:

    python -m launch.train --config=configs/sct_spatial.py --config.data.store=SPATIAL_STORE \
        --config.init_from=runs/sct --workdir=runs/sct_spatial

    Hardware: as for stage 1, one A100 80 GB or better. The store needs coordinates of the spots (`launch.ingest
    --spatial_key`) and the gene vocabulary of the stage 1 model. Without init_from, training starts from random
    initialization and prints a notice.

:mini trains the small model on a laptop, from a run of `configs/sct_sc.py:mini`:

    python -m launch.train --config=configs/sct_spatial.py:mini --config.data.store=SPATIAL_STORE \
        --config.init_from=runs/mini --workdir=runs/mini_spatial

To use bags of random spots instead of neighbors, set `--config.data.spatial_bags=False`. There is no :quickstart,
because the installed packages contain no spatial data of real tissue.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

VARIANTS = ("", "mini")

_SINGLE_CELL = runpy.run_path(str(Path(__file__).with_name("sct_sc.py")))


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the paper's second stage, or of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = _SINGLE_CELL["get_config"](variant)
    config.model.use_spatial = True
    config.data.spatial_bags = True
    if not variant:
        config.data.tokens = 1.5e11
    return config
