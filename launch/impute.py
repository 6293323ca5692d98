"""Impute genes or whole cells of an .h5ad file.

    python -m launch.impute --input=cells.h5ad --model=runs/mine --genes=CD3E --output=imputed.h5ad

`--help` lists all flags; see also `sct.commands.impute`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("impute")
