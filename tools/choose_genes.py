"""Choose the genes of a small model by the training cells of a store, and write them to a gene table.

    python tools/choose_genes.py --store=STORE --number=4096 --output=genes.tsv
    python -m launch.ingest --input=FILES --genes=genes.tsv --output=SMALL_STORE

Chooses the most variable genes and puts genes that are expressed together next to each other, because the convolutions
of sCT see the order.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sct.data.gene_selection import chosen_vocabulary
from sct.data.store import Store
from sct.errors import SctError


def main() -> int:
    """Choose the genes, and print how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", required=True, help="Store folder with training cells.")
    parser.add_argument("--output", required=True, type=Path, help="Output table (.tsv).")
    parser.add_argument("--number", type=int, default=4096, help="Number of genes; 0: all expressed genes.")
    parser.add_argument(
        "--order", choices=("coexpression", "store"), default="coexpression", help="Order of the genes."
    )
    given = parser.parse_args()
    try:
        genes = chosen_vocabulary(Store.open(given.store), given.number, given.order == "coexpression")
        genes.save(given.output)
    except SctError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{given.output}: {len(genes):,} genes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
