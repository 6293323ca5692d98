"""Name the cells of an .h5ad file: by the nearest of annotated cells, or by a model that answers in words.

    sct annotate --input=cells.h5ad --reference=atlas.h5ad --label_key=cell_type --model=runs/mine --output=out.h5ad
    sct annotate --input=cells.h5ad --model=runs/c2s --output=out.h5ad

The output is the input with obs["sct_label"] ("unknown" where fewer than half of the nearest reference cells
agree) and obs["sct_label_probability"]. A model of cell sentences needs no reference; --candidates gives the answers to
choose among in place of all that it learned. In a clone, `python -m launch.annotate` is the same program.
"""

from __future__ import annotations

from absl import flags

from sct.commands import cell_flags, output_flags

_REFERENCE = flags.DEFINE_string("reference", None, "Annotated cells, .h5ad or .zarr.")
_LABEL = flags.DEFINE_string(
    "label_key", None, "Column of the reference's obs with the labels; or what a model in words is asked for."
)
_CANDIDATES = flags.DEFINE_multi_string(
    "candidates", [], "Answer to choose among; give the flag several times."
)
_REP = flags.DEFINE_string(
    "use_rep", None, "Key of an embedding that both have in obsm, in place of a model."
)
_NEIGHBORS = flags.DEFINE_integer("n_neighbors", 15, "Reference cells that vote.")
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Least probability; below it a cell is unknown. 0.5 with a reference, otherwise 0."
)
_CONTEXTS = flags.DEFINE_integer(
    "n_contexts", None, "Draws of the bags to average; 3 by default with a reference and a model."
)
_KEY = flags.DEFINE_string("key_added", "sct_label", "Name of the result.")

FLAG_MODULES = ("sct.commands.cell_flags", "sct.commands.output_flags")


def main(argv: list[str]) -> None:
    """Annotate as the flags say."""
    from sct.commands import tables
    from sct.tl.annotation import annotate

    target = tables.check_output(
        cell_flags.OUTPUT.value, cell_flags.INPUT.value, output_flags.OVERWRITE.value
    )
    adata = tables.read(cell_flags.INPUT.value)
    reference = tables.read(_REFERENCE.value) if _REFERENCE.value else None
    key, made = _KEY.value, []
    options = cell_flags.given() if reference is None else cell_flags.options()
    if reference is not None and not _REP.value:
        made = ["X_sct"]
    annotate(
        adata, cell_flags.MODEL.value, reference=reference, label_key=_LABEL.value, use_rep=_REP.value,
        candidates=_CANDIDATES.value or None, n_neighbors=_NEIGHBORS.value, threshold=_THRESHOLD.value,
        n_contexts=_CONTEXTS.value, key_added=key,
        **({} if _REP.value else options),
    )  # fmt: skip
    added = {
        "obs": [key],
        "obsm": [f"{key}_probabilities", *made],
        "uns": [key, *made, *cell_flags.scales(adata)],
    }
    tables.write(adata, cell_flags.INPUT.value, target, added)
    for name, count in adata.obs[key].value_counts().items():
        print(f"{count:>10,}  {name}")
    print(f'obs["{key}"] in {target}')
