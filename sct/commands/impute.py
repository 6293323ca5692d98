"""Impute genes or whole cells of an .h5ad file.

    sct impute --input=cells.h5ad --model=runs/mine --genes=CD3E,MS4A1 --output=imputed.h5ad
    sct impute --input=panel.h5ad --model=models/sct --genes=missing --output=imputed.h5ad
    sct impute --input=slide.h5ad --model=models/sct --spatial_key=spatial --cells=names.txt --output=imputed.h5ad

Writes a copy of the input with expected raw counts in layers["sct_expected"], the most likely expression levels in
layers["sct_level"] and the probability that a gene is expressed in layers["sct_probability"]. Genes that the input
lacks are written to tables of the same names in obsm. X is not changed. If --output ends with .csv, .tsv or .parquet,
only the expected raw counts of the imputed genes are written, as a table with one row per cell. In a clone, `python -m
launch.impute` is the same program.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from sct import messages
from sct.commands import cell_flags, model_flags
from sct.commands.flag_errors import FlagError

_GENES = flags.DEFINE_list(
    "genes", None, "Genes to impute, separated by commas; 'missing' means all genes that the input lacks."
)
_CELLS = flags.DEFINE_string(
    "cells", None, "Cells to impute as a whole: names separated by commas, or a text file with one per line."
)
_KEY = flags.DEFINE_string(
    "key_added", "sct", "Prefix of the names written: PREFIX_expected, PREFIX_level, PREFIX_probability."
)

FLAG_MODULES = cell_flags.WITH_MODEL
flags.mark_flag_as_required("model")


def main(argv: list[str]) -> None:
    """Impute genes or cells of the input file and write the output file."""
    from sct.commands import tables
    from sct.tl.imputation import MISSING, RESULTS, impute

    target = cell_flags.checked_output()
    genes, key, cells = _GENES.value, _KEY.value, None
    if _CELLS.value is not None:
        file = Path(_CELLS.value).expanduser()
        if not file.is_file() and file.suffix in (".txt", ".tsv", ".csv"):
            raise FlagError(
                f"--cells={file} names a file that does not exist: give a file with one cell name per line, "
                "or the names separated by commas."
            )
        listed = file.read_text().split("\n") if file.is_file() else _CELLS.value.split(",")
        cells = [name.strip() for name in listed if name.strip()]
    if genes is None and cells is None:
        raise FlagError(
            "at least one of --genes and --cells is needed: write --genes=CD3E,MS4A1 (names of genes), "
            "--genes=missing (all genes that the input lacks) or --cells=NAMES (names of cells)."
        )
    adata = tables.read(cell_flags.INPUT.value, may_be_backed=cells is None)
    asked = MISSING if genes == [MISSING] else genes
    impute(adata, model_flags.model(), genes=asked, cells=cells, key_added=key, **cell_flags.options())
    names = [f"{key}_{ending}" for ending in RESULTS]
    added = {slot: [n for n in names if n in getattr(adata, slot)] for slot in ("layers", "obsm")}
    tables.write(
        adata, cell_flags.INPUT.value, target, {**added, "uns": [key, *cell_flags.scales(adata)]}, names[:1]
    )
    settings = adata.uns[key]
    what = f"{len(settings['genes']):,} genes" if len(settings["genes"]) else "all genes"
    messages.info(
        f"imputed {what} of {len(settings['cells']) or adata.n_obs:,} cells with {settings['model']}; counts from "
        f"{settings['counts_from']}"
    )
    if target.suffix != ".h5ad":
        messages.info(f"{names[0]} in {target}")
        return
    for slot, keys in added.items():
        for name in keys:
            messages.info(f'{slot}["{name}"] in {target}')
