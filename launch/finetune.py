r"""Fine-tune a pretrained model for the cell types of labeled cells in an .h5ad file.

    python -m launch.finetune --input=atlas.h5ad --model=runs/mine --label_key=cell_type --donor_key=donor \
        --output=runs/tuned

`--help` lists all flags; see also `sct.commands.finetune`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("finetune")
