"""sCT on spatial data (stage 2 of the paper): goes on from a model of single cells, with coordinates.

Full model, 1.5 x 10^11 tokens, from stage 1 (`configs/sct_sc.py`); bags are spots and their nearest neighbours, the
map of coordinates is new and starts at zero:

    python -m launch.train --config=configs/sct_spatial.py --config.data.store=SPATIAL_STORE \
        --config.init_from=runs/sct --workdir=runs/sct_spatial

    Hardware: as for stage 1, one A100 80 GB or better. The store needs positions (`launch.ingest --spatial_key`) and
    the vocabulary of the model it starts from; a run without init_from starts from random parameters and says so.

:mini, the same from a run of `configs/sct_sc.py:mini`, for a laptop:

    python -m launch.train --config=configs/sct_spatial.py:mini --config.data.store=SPATIAL_STORE \
        --config.init_from=runs/mini --workdir=runs/mini_spatial

`--config.data.spatial_bags=False` makes bags of random spots instead of neighbours. There is no :quickstart: no
spatial data of real tissue comes with the packages.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

VARIANTS = ("", "mini")

_SINGLE_CELL = runpy.run_path(str(Path(__file__).with_name("sct_sc.py")))


def get_config(variant: str = "") -> ConfigDict:
    """The paper's second stage, or a small variant of it."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS[1:])}")
    config = _SINGLE_CELL["get_config"](variant)
    config.model.use_spatial = True
    config.data.spatial_bags = True
    if not variant:
        config.data.tokens = 1.5e11
    return config
