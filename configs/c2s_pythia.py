"""Train Cell2Sentence with Pythia-160m on sentences of all expressed genes, up to 9,200 tokens (paper, section 4).

This command fine-tunes Pythia-160m from a Hugging Face folder. The folder must contain `config.json`,
`model.safetensors` and `tokenizer.json`:

    python -m launch.train --config=configs/c2s_pythia.py --config.init_from=PYTHIA_FOLDER \
        --config.data.store=STORE --workdir=runs/c2s_pythia

    Hardware: the paper used eight A100 of 40 GB for 29 hours (21 epochs of 218,732 cells). With several devices, use a
    batch size that is a multiple of their number.

:quickstart trains a small GPT-NeoX from random initialization on real blood cells from scanpy, on 2 CPU cores. The
sentences contain all expressed genes:

    python -m launch.train --config=configs/c2s_pythia.py:quickstart --workdir=runs/c2s_pythia_quickstart
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

VARIANTS = ("", "quickstart")

_GPT2 = runpy.run_path(str(Path(__file__).with_name("c2s_gpt2.py")))


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the paper's recipe, or of a variant.

    Values that are not set here come from `c2s_gpt2.py`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = _GPT2["get_config"](variant)
    config.family = "neox"
    config.model.init = "normal"
    config.data.top_k = 0  # sentences of all expressed genes
    config.objective.loss_on = "all"  # the paper trains on all tokens (appendix C)
    if not variant:
        config.model.update(
            max_length=9_200, dropout=0.0, remat="level"
        )  # rotary models can also read longer sequences
        config.data.length = 9_200
        config.train.update(steps=140_000, eval_every=5_000, checkpoint_every=5_000)
    if variant == "quickstart":
        config.model.max_length = 768
        config.data.length = 384
        config.objective.report_cells = 140
    return config
