"""Annotate the cells of an .h5ad file, by label transfer, a fine-tuned model, or a model that answers with text.

    sct annotate --input=cells.h5ad --reference=atlas.h5ad --label_key=cell_type --model=runs/mine --output=out.h5ad
    sct annotate --input=cells.h5ad --model=runs/mine --adapters=runs/tuned/adapters --output=out.h5ad
    sct annotate --input=cells.h5ad --model=runs/c2s --output=out.h5ad

Writes a copy of the input with labels in obs["sct_label"] and their probabilities in obs["sct_label_probability"]. If
--output ends with .csv, .tsv or .parquet, only these columns are written, as a table with one row per cell.
With --reference, a cell gets the label with the highest probability among its nearest reference cells. If this
probability is below --threshold, the label is "unknown". A model that `sct finetune` wrote needs no reference, and
neither does a model of cell sentences; --candidates restricts the labels that a model of cell sentences can give. In a
clone, `python -m launch.annotate` is the same program.
"""

from __future__ import annotations

from absl import flags

from sct import messages
from sct.commands import cell_flags, model_flags

_REFERENCE = flags.DEFINE_string(
    "reference", None, "Annotated cells to transfer labels from: an .h5ad file or a .zarr folder."
)
_LABEL = flags.DEFINE_string(
    "label_key",
    None,
    "Column of obs in the reference with the labels; without a reference, the kind of label to ask the model for.",
)
_CANDIDATES = flags.DEFINE_multi_string(
    "candidates", [], "Label that the model may answer; for models that answer with text."
)
_REP = flags.DEFINE_string(
    "use_rep", None, "Key in obsm of an embedding that both files have; used instead of --model."
)
_NEIGHBORS = flags.DEFINE_integer(
    "n_neighbors", 15, "Number of nearest reference cells that vote on a label.", lower_bound=1
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    None,
    "Minimum probability of a label (0 to 1); cells below it become unknown. Default: 0.5 with a "
    "reference, otherwise 0.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_CONTEXTS = flags.DEFINE_integer(
    "n_contexts",
    None,
    "Number of random bags per cell; their results are averaged. Default: 3 with a reference and a model.",
    lower_bound=1,
)
_CLUSTERS = flags.DEFINE_string(
    "over_clustering",
    None,
    "Column of obs with fine clusters; each cluster then also gets the most common label of its cells.",
)
_KEY = flags.DEFINE_string(
    "key_added", "sct_label", "Column of obs to write; also the prefix of all other names that are written."
)

FLAG_MODULES = cell_flags.WITH_MODEL


def main(argv: list[str]) -> None:
    """Annotate the cells of the input file and write the output file."""
    from sct.commands import tables
    from sct.tl.annotation import annotate

    target = cell_flags.checked_output()
    adata = tables.read(cell_flags.INPUT.value)
    reference = tables.read(_REFERENCE.value) if _REFERENCE.value else None
    key, made = _KEY.value, []
    options = cell_flags.given() if reference is None else cell_flags.options()
    if reference is not None and not _REP.value:
        made = ["X_sct"]
    annotate(
        adata, model_flags.model(), reference=reference, label_key=_LABEL.value, use_rep=_REP.value,
        candidates=_CANDIDATES.value or None, n_neighbors=_NEIGHBORS.value, threshold=_THRESHOLD.value,
        n_contexts=_CONTEXTS.value, over_clustering=_CLUSTERS.value, key_added=key,
        **({} if _REP.value else options),
    )  # fmt: skip
    added = {
        "obs": [key],
        "obsm": [f"{key}_probabilities", *made],
        "uns": [key, *made, *cell_flags.scales(adata)],
    }
    scores = [f"{key}_{ending}" for ending in ("majority", "probability", "agreement")]
    table = [key, *(name for name in scores if name in adata.obs)]
    tables.write(adata, cell_flags.INPUT.value, target, added, table)
    for name, count in adata.obs[key].value_counts().items():
        messages.info(f"{count:>10,}  {name}")
    messages.info(f'obs["{key}"] in {target}' if target.suffix == ".h5ad" else f"{key} in {target}")
