"""Compute an embedding for each cell of an .h5ad file.

    sct embed --input=cells.h5ad --model=runs/mine --output=embedded.h5ad
    sct embed --input=slide.h5ad --model=models/sct --spatial_key=spatial --batch_key=slide --output=out.h5ad

Writes a copy of the input with the embedding in obsm["X_sct"] and its settings in uns["X_sct"]. If --output ends with
.csv, .tsv or .parquet, only the embedding is written, as a table with one row per cell. The input needs raw
counts (in X, raw or a layer) and genes as Ensembl ids or symbols. Without --model, the packaged default model is used,
if this installation has one (see `sct models`). Input files above 1 GB are read in blocks, to save
memory. In a clone, `python -m launch.embed` is the same program.
"""

from __future__ import annotations

from absl import flags

from sct import messages
from sct.commands import cell_flags, model_flags
from sct.weights import packaged

_KEY = flags.DEFINE_string("key_added", "X_sct", "Key in obsm to write the embedding to.")
_CONTEXT = flags.DEFINE_enum(
    "context",
    "tiles",
    ["tiles", "neighbors"],
    "With --spatial_key, how bags are formed: from compact tiles, or from each cell's nearest neighbors.",
)
_CONTEXTS = flags.DEFINE_integer(
    "n_contexts", 1, "Number of random bags per cell; the embedding is their mean.", lower_bound=1
)
# The reader of the model checks the readout.
_READOUT = flags.DEFINE_string(
    "readout",
    None,
    "Which embedding to use, if the model has several: cls, mean or weighted for models of gene tokens; mean, flat, "
    "conv, fitted or code for sCT. Default: set by the model.",
)

FLAG_MODULES = cell_flags.WITH_MODEL
if not packaged.has_default():
    flags.mark_flag_as_required("model")


def main(argv: list[str]) -> None:
    """Embed the cells of the input file and write the output file."""
    from sct.commands import tables
    from sct.inference import inputs
    from sct.tl.embedding import comparison_note, embed

    target = cell_flags.checked_output()
    adata = tables.read(cell_flags.INPUT.value)
    chosen = model_flags.model()
    if chosen is None:
        chosen = packaged.DEFAULT
        messages.info(f"Using the packaged model {chosen}. Set --model to choose another model.")
    key, model = _KEY.value, inputs.load_model(chosen)
    embed(
        adata, model, key_added=key, context=_CONTEXT.value, n_contexts=_CONTEXTS.value,
        readout=_READOUT.value, **cell_flags.options(),
    )  # fmt: skip
    tables.write(
        adata, cell_flags.INPUT.value, target, {"obsm": [key], "uns": [key, *cell_flags.scales(adata)]}, [key]
    )
    settings = adata.uns[key]
    messages.info(
        f"{adata.n_obs:,} cells embedded by {settings['model']}; counts from {settings['counts_from']}, "
        f"{settings['genes_matched']:,} genes matched"
    )
    if _READOUT.value is None and (note := comparison_note(model)):
        messages.info(note)
    messages.info(f'obsm["{key}"] in {target}' if target.suffix == ".h5ad" else f"{key} in {target}")
