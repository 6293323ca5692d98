"""Compute an embedding for each cell of an .h5ad file.

    python -m launch.embed --input=cells.h5ad --model=runs/mine --output=embedded.h5ad

`--help` lists all flags; see also `sct.commands.embed`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("embed")
