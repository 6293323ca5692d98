"""Turn h5ad files, 10x .h5 files, 10x mtx folders, zarr groups and CELLxGENE Census data sets into a store.

    sct ingest --input=data/ --output=stores/mine
    sct ingest --input=a.h5ad,b.h5 --input=liver=c/outs --output=stores/mine --validation=liver
    sct ingest --input=census:DATASET_ID --output=stores/mine --processes=4
    sct ingest --input=slides.h5ad --study_key=section --output=stores/spatial
    sct ingest --input=mouse.h5ad --orthologues=mart_export.txt.gz --output=stores/mine
    sct ingest --input=gene_scores.h5ad --values=activity --output=stores/chromatin

Folders are searched. Each input becomes a study named after its file (or NAME in NAME=PATH). Counts must
be raw; genes are aligned to the human protein-coding genes, or to --genes. Files of mouse or another species
are named by the one-to-one pairs of a table, --orthologues, in an ingest of their own that adds them to the
store. Matrices that are no counts, such as fractional gene activities of chromatin, need --values=activity;
only ZerOmics reads them. Running the same command again resumes after an interruption, and with more inputs
it adds to the store; studies that have not changed are kept. At the end a table says what was taken and what
was dropped, and why. Train on the store with --config.data.store=stores/mine. In a clone,
`python -m launch.ingest` is the same program.
"""

from __future__ import annotations

import os

from absl import flags

_INPUT = flags.DEFINE_multi_string(
    "input", [], "File, folder, census:ID or NAME=PATH; repeat, or use commas."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the store.")
_GENES = flags.DEFINE_string("genes", None, "Gene vocabulary file; default: human protein-coding genes.")
_LAYER = flags.DEFINE_string("layer", None, "'X', 'raw' or a layer; default: the first with raw counts.")
_GENE_COLUMN = flags.DEFINE_string(
    "gene_column", None, "Column of var with gene ids or symbols; default: found."
)
_DUPLICATES = flags.DEFINE_enum("duplicates", "error", ["error", "sum"], "Several columns of one gene.")
_STUDY_KEY = flags.DEFINE_string("study_key", None, "Column of obs that splits an input into studies.")
_SPATIAL_KEY = flags.DEFINE_string("spatial_key", "spatial", "Key of coordinates in obsm.")
_MIN_GENES = flags.DEFINE_integer("min_genes", 0, "Drop cells with fewer genes.", lower_bound=0)
_MIN_COUNTS = flags.DEFINE_integer("min_counts", 1, "Drop cells with fewer counts.", lower_bound=0)
_VALIDATION = flags.DEFINE_list("validation", None, "Studies for validation.")
_TEST = flags.DEFINE_list("test", None, "Studies for testing.")
_FRACTION = flags.DEFINE_float(
    "validation_fraction", None, "Share of studies for validation, chosen by name."
)
_SEED = flags.DEFINE_integer("seed", 0, "Order of the cells.")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Inputs read at once; default: one per core.", lower_bound=1
)
_SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "Finish the store without inputs that are refused.")
_ORTHOLOGUES = flags.DEFINE_string(
    "orthologues", None, "Table of orthologues, for inputs of another species alone (.tsv, .csv, .gz)."
)
_ORTHOLOGUE_COLUMNS = flags.DEFINE_list(
    "orthologue_columns", None, "Its columns SOURCE,TARGET; default: BioMart's, else the first two."
)
_VALUES = flags.DEFINE_enum(
    "values", "counts", ["counts", "activity"], "What matrices hold; activity: any non-negative values."
)
_CENSUS_VERSION = flags.DEFINE_string("census_version", "stable", "Release of the CELLxGENE Census.")


TAKES_ARGUMENTS = True  # inputs may also stand without --input


def main(argv: list[str]) -> None:
    """Ingest what the flags say."""
    from sct.data.ingest import build as ingest

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
        skip_bad=_SKIP_BAD.value,
        census_version=_CENSUS_VERSION.value,
        orthologues=_ORTHOLOGUES.value,
        orthologue_columns=None if _ORTHOLOGUE_COLUMNS.value is None else tuple(_ORTHOLOGUE_COLUMNS.value),
        values=_VALUES.value,
    )
