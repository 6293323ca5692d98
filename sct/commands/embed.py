"""Embed the cells of an .h5ad file.

    sct embed --input=cells.h5ad --model=runs/mine --output=embedded.h5ad
    sct embed --input=slide.h5ad --model=models/sct --spatial_key=spatial --batch_key=slide --output=out.h5ad

The output is the input with the embedding in obsm["X_sct"]. Raw counts are needed (X, raw or a layer); genes are
Ensembl ids or symbols. Files above 1 GB are read in pieces. In a clone, `python -m launch.embed` is the same program.
"""

from __future__ import annotations

from absl import flags

from sct.errors import ConfigError

_INPUT = flags.DEFINE_string("input", None, ".h5ad file or .zarr folder with raw counts.", required=True)
_MODEL = flags.DEFINE_string("model", None, "Model folder, run folder or hub id.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, ".h5ad file to write.", required=True)
_KEY = flags.DEFINE_string("key_added", "X_sct", "Key of the embedding in obsm.")
_LAYER = flags.DEFINE_string("layer", None, "Layer with the raw counts; found by default.")
_BATCH = flags.DEFINE_string("batch_key", None, "Column of obs within which cells share a bag.")
_SPATIAL = flags.DEFINE_string("spatial_key", None, "Key of positions in obsm: neighbours share a bag.")
_CONTEXT = flags.DEFINE_enum(
    "context",
    "tiles",
    ["tiles", "neighbors"],
    "With positions: compact tiles, or a bag centred on each cell.",
)
_CELLS = flags.DEFINE_integer("cells_per_bag", None, "Cells read together; as in training by default.")
_SIZE = flags.DEFINE_integer("batch_size", None, "Bags computed at once; by default what fits well.")
_COLUMN = flags.DEFINE_string(
    "gene_column", None, "Column of var with gene ids or symbols; found by default."
)
_DUPLICATES = flags.DEFINE_enum("duplicates", "error", ["error", "sum"], "Several columns of one gene.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the bags.")


def main(argv: list[str]) -> None:
    """Embed as the flags say."""
    if len(argv) > 1:
        raise ConfigError(
            f"{argv[1]!r} is not a flag: options are written --name=value, a list without spaces."
        )
    from sct.commands import tables
    from sct.tl.embedding import embed

    target = tables.check_output(_OUTPUT.value, _INPUT.value)
    adata = tables.read(_INPUT.value)
    key = _KEY.value
    embed(
        adata, _MODEL.value, layer=_LAYER.value, key_added=key, batch_key=_BATCH.value,
        spatial_key=_SPATIAL.value, context=_CONTEXT.value, cells_per_bag=_CELLS.value,
        batch_size=_SIZE.value, gene_column=_COLUMN.value, duplicates=_DUPLICATES.value, seed=_SEED.value,  # type: ignore[arg-type]
    )  # fmt: skip
    tables.write(adata, _INPUT.value, target, {"obsm": [key], "uns": [key]})
    said = adata.uns[key]
    print(
        f"{adata.n_obs:,} cells embedded by {said['model']}; counts from {said['counts_from']}, "
        f"{said['genes_matched']:,} genes found"
    )
    print(f'obsm["{key}"] in {target}')
