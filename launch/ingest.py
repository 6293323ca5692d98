"""Ingest h5ad files, 10x .h5 files, 10x mtx folders, zarr groups and CELLxGENE Census data sets into a store.

    python -m launch.ingest --input=data/ --output=stores/mine
    python -m launch.ingest --input=a.h5ad,b.h5 --input=liver=c/outs --output=stores/mine --validation=liver

`--help` lists all flags; see also `sct.commands.ingest`.
"""

from sct.cli import main

if __name__ == "__main__":
    main("ingest")
