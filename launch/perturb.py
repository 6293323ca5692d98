"""Knock out genes in the cells of an .h5ad file in silico, and compare the effect with that of random genes.

    python -m launch.perturb --input=cells.h5ad --model=runs/mine --genes=GATA1,TAL1 --output=perturbed.h5ad

`--help` lists all flags; see also `sct.commands.perturb`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("perturb")
