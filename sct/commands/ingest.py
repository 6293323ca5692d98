"""Ingest h5ad files, 10x .h5 files, 10x mtx folders, zarr groups and CELLxGENE Census data sets into a store.

    sct ingest --input=data/ --output=stores/mine
    sct ingest --input=a.h5ad,b.h5 --input=liver=c/outs --output=stores/mine --validation=liver
    sct ingest --input=census:DATASET_ID --output=stores/mine --processes=4
    sct ingest --input=slides.h5ad --study_key=section --output=stores/spatial
    sct ingest --input=mouse.h5ad --orthologs=mart_export.txt.gz --output=stores/mine
    sct ingest --input=gene_scores.h5ad --values=activity --output=stores/chromatin

Writes a store, which `sct train --config.data.store=stores/mine` reads, and prints a table of the cells kept and
dropped. Folders are searched for inputs. Each input becomes a study with the name of its file, or NAME for NAME=PATH.
Counts must be raw. Genes are aligned to the human protein-coding genes, or to the genes in --genes.

For mouse or another species, --orthologs maps the genes by one-to-one pairs. Ingest each species in a separate command;
each command adds its studies to the store. Matrices that are not counts, such as gene activities of chromatin, need
--values=activity; only ZerOmics reads such a store.

After an interruption, run the same command again to resume. With more inputs, the command adds them to the store and
keeps unchanged studies. In a clone, `python -m launch.ingest` is the same program.
"""

from __future__ import annotations

import os

from absl import flags

from sct.commands.flag_errors import FlagError

_INPUT = flags.DEFINE_multi_string(
    "input", [], "Cells to read: a file, a folder, census:ID or NAME=PATH, or several separated by commas."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the store to write or to add to.", required=True)
_GENES = flags.DEFINE_string("genes", None, "Gene vocabulary file. Default: human protein-coding genes.")
_LAYER = flags.DEFINE_string(
    "layer", None, "Where the raw counts are: X, raw or a layer. Default: the first that holds raw counts."
)
_GENE_COLUMN = flags.DEFINE_string(
    "gene_column", None, "Column of var with Ensembl ids or gene symbols. Default: found automatically."
)
_DUPLICATES = flags.DEFINE_enum(
    "duplicates",
    "error",
    ["error", "sum"],
    "If several columns belong to one gene: stop with an error, or sum them.",
)
_STUDY_KEY = flags.DEFINE_string(
    "study_key", None, "Column of obs that splits an input into several studies."
)
_SPATIAL_KEY = flags.DEFINE_string("spatial_key", "spatial", "Key of spatial coordinates in obsm.")
_MIN_GENES = flags.DEFINE_integer(
    "min_genes", 0, "Drop cells with fewer expressed genes than this.", lower_bound=0
)
_MIN_COUNTS = flags.DEFINE_integer(
    "min_counts", 1, "Drop cells with a smaller total count than this.", lower_bound=0
)
_VALIDATION = flags.DEFINE_list("validation", None, "Names of the studies in the validation split.")
_TEST = flags.DEFINE_list("test", None, "Names of the studies in the test split.")
_FRACTION = flags.DEFINE_float(
    "validation_fraction",
    None,
    "Fraction of the studies (0 to 1) in the validation split, chosen by a hash of their names.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed for the order of the cells.")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Number of inputs read in parallel. Default: one per core.", lower_bound=1
)
_SKIP_INVALID = flags.DEFINE_bool(
    "skip_invalid", False, "Skip inputs that cannot be used, instead of stopping."
)
_ORTHOLOGS = flags.DEFINE_string(
    "orthologs", None, "Table of orthologs (.tsv, .csv, .gz), for inputs of another species."
)
_ORTHOLOG_COLUMNS = flags.DEFINE_list(
    "ortholog_columns",
    None,
    "Columns SOURCE,TARGET of the table in --orthologs. Default: BioMart's columns, or the first two.",
)
_VALUES = flags.DEFINE_enum(
    "values",
    "counts",
    ["counts", "activity"],
    "What the matrices hold: raw counts, or any non-negative values.",
)
_CENSUS_VERSION = flags.DEFINE_string(
    "census_version", "stable", "Release of the CELLxGENE Census, for inputs census:ID."
)


TAKES_ARGUMENTS = True  # inputs may also be given without --input
RENAMED_FLAGS = {
    "orthologues": "orthologs", "orthologue_columns": "ortholog_columns", "skip_bad": "skip_invalid",
}  # fmt: skip


def main(argv: list[str]) -> None:
    """Ingest the inputs into the store, as the flags of the command line say."""
    from sct.data.ingest import build as ingest

    if not [*_INPUT.value, *argv[1:]]:
        raise FlagError("--input is missing, but ingest needs one or more inputs: write --input=PATH.")
    ingest.main(
        [*_INPUT.value, *argv[1:]],
        _OUTPUT.value,
        genes=_GENES.value,
        layer=_LAYER.value,
        gene_column=_GENE_COLUMN.value,
        duplicates=_DUPLICATES.value,
        study_key=_STUDY_KEY.value,
        spatial_key=_SPATIAL_KEY.value,
        seed=_SEED.value,
        min_genes=_MIN_GENES.value,
        min_counts=_MIN_COUNTS.value,
        validation=None if _VALIDATION.value is None else tuple(_VALIDATION.value),
        test=None if _TEST.value is None else tuple(_TEST.value),
        validation_fraction=_FRACTION.value,
        processes=_PROCESSES.value or os.cpu_count() or 1,
        skip_bad=_SKIP_INVALID.value,
        census_version=_CENSUS_VERSION.value,
        orthologs=_ORTHOLOGS.value,
        ortholog_columns=None if _ORTHOLOG_COLUMNS.value is None else tuple(_ORTHOLOG_COLUMNS.value),
        values=_VALUES.value,
    )
