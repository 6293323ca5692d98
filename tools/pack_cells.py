"""Pack cells of a store into one small file. tools/gpu_suite.py trains on this file.

    python tools/pack_cells.py --store=STORE --output=cells.npz --max_mib=36

Prints the number of cells and the size of the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sct.data.packed_cells import pack
from sct.data.store import Store
from sct.errors import SctError


def main() -> int:
    """Pack the cells, and print how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", required=True, help="Store folder.")
    parser.add_argument("--output", required=True, type=Path, help="Output file (.npz).")
    parser.add_argument("--max_mib", type=float, default=36.0, help="Largest size of the file in MiB.")
    parser.add_argument(
        "--validation_cells", type=int, default=200, help="Largest number of cells of each validation study."
    )
    given = parser.parse_args()
    try:
        packed = pack(
            Store.open(given.store), given.output, int(given.max_mib * 2**20), given.validation_cells
        )
    except SctError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    held_out = sum(map(len, packed.rows(held_out=True)))
    print(
        f"{given.output}: {len(packed) - held_out:,} training cells and {held_out:,} validation cells of "
        f"{len(packed.names)} studies, {given.output.stat().st_size / 2**20:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
