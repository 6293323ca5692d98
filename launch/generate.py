"""Generate cells with a model of cell sentences.

    python -m launch.generate --model=runs/c2s --cell_type="CD14+ Monocyte" --n=100 --output=generated.h5ad

`--help` lists all flags; see also `sct.commands.generate`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("generate")
