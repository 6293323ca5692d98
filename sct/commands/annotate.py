"""Transfer labels from annotated cells to the cells of an .h5ad file, by a model's embedding.

    sct annotate --input=cells.h5ad --reference=atlas.h5ad --label_key=cell_type --model=runs/mine --output=out.h5ad

The output is the input with obs["sct_label"] ("unknown" where fewer than half of the nearest reference cells
agree) and obs["sct_label_probability"]. In a clone, `python -m launch.annotate` is the same program.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from sct.errors import ConfigError

_INPUT = flags.DEFINE_string("input", None, ".h5ad file or .zarr folder with raw counts.", required=True)
_REFERENCE = flags.DEFINE_string("reference", None, "Annotated cells, .h5ad or .zarr.", required=True)
_LABEL = flags.DEFINE_string(
    "label_key", None, "Column of the reference's obs with the labels.", required=True
)
_MODEL = flags.DEFINE_string("model", None, "Model folder, run folder or hub id.")
_OUTPUT = flags.DEFINE_string("output", None, ".h5ad file to write.", required=True)
_REP = flags.DEFINE_string(
    "use_rep", None, "Key of an embedding that both have in obsm, in place of a model."
)
_NEIGHBORS = flags.DEFINE_integer("n_neighbors", 15, "Reference cells that vote.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.5, "Smallest share of the votes; below it a cell is unknown.")
_KEY = flags.DEFINE_string("key_added", "sct_label", "Name of the result.")
_LAYER = flags.DEFINE_string("layer", None, "Layer with the raw counts; found by default.")
_BATCH = flags.DEFINE_string("batch_key", None, "Column of obs within which cells share a bag.")
_SPATIAL = flags.DEFINE_string("spatial_key", None, "Key of positions in obsm: neighbours share a bag.")
_COLUMN = flags.DEFINE_string(
    "gene_column", None, "Column of var with gene ids or symbols; found by default."
)
_DUPLICATES = flags.DEFINE_enum("duplicates", "error", ["error", "sum"], "Several columns of one gene.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the bags.")


def main(argv: list[str]) -> None:
    """Annotate as the flags say."""
    if len(argv) > 1:
        raise ConfigError(
            f"{argv[1]!r} is not a flag: options are written --name=value, a list without spaces."
        )
    from sct.commands import tables
    from sct.tl.annotation import annotate

    target = tables.check_output(_OUTPUT.value, _INPUT.value)
    adata, reference = tables.read(_INPUT.value), tables.read(_REFERENCE.value)
    key = _KEY.value
    embedding: dict[str, Any] = {
        "layer": _LAYER.value, "batch_key": _BATCH.value, "spatial_key": _SPATIAL.value,
        "gene_column": _COLUMN.value, "duplicates": _DUPLICATES.value, "seed": _SEED.value,
    }  # fmt: skip
    annotate(
        adata, _MODEL.value, reference=reference, label_key=_LABEL.value, use_rep=_REP.value,
        n_neighbors=_NEIGHBORS.value, threshold=_THRESHOLD.value, key_added=key,
        **({} if _REP.value else embedding),
    )  # fmt: skip
    made = [] if _REP.value else ["X_sct"]
    added = {"obs": [key], "obsm": [f"{key}_probabilities", *made], "uns": [key, *made]}
    tables.write(adata, _INPUT.value, target, added)
    for name, count in adata.obs[key].value_counts().items():
        print(f"{count:>10,}  {name}")
    print(f'obs["{key}"] in {target}')
