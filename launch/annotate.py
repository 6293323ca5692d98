r"""Annotate the cells of an .h5ad file, by label transfer or by a model that answers with text.

    python -m launch.annotate --input=cells.h5ad --reference=atlas.h5ad --label_key=cell_type \
        --model=runs/mine --output=out.h5ad

`--help` lists all flags; see also `sct.commands.annotate`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("annotate")
