"""Knock out genes in the cells of an .h5ad file in silico, and compare the effect with that of random genes.

    sct perturb --input=cells.h5ad --model=runs/mine --genes=GATA1,TAL1,GATA1+TAL1 --output=perturbed.h5ad
    sct perturb --input=cells.h5ad --model=runs/mine --genes=GATA1 --targets=HBB,HBA1 --output=perturbed.h5ad

Writes a copy of the input with the effect on each cell in obsm["sct_perturb"], and the effect of each perturbation with
its p-value in uns["sct_perturb"]["effects"]. If --output ends with .csv, .tsv or .parquet, only the effect on each cell
is written, as a table with one row per cell. The mean effects, the p-values and the changes of the targets are also
printed. In a clone, `python -m launch.perturb` is the same program.
"""

from __future__ import annotations

from absl import flags

from sct import messages
from sct.commands import cell_flags, model_flags

_GENES = flags.DEFINE_list(
    "genes", None, "Genes to knock out, separated by commas; genes joined by '+' are knocked out together.",
    required=True,
)  # fmt: skip
_MODE = flags.DEFINE_enum(
    "mode", "zero", ["zero", "mask"], "Set the counts of the genes to zero, or hide the genes from the model."
)
_TARGETS = flags.DEFINE_list(
    "targets",
    None,
    "Genes whose expected counts are compared, separated by commas; needs a model that can impute.",
)
_METRIC = flags.DEFINE_enum("metric", "cosine", ["cosine", "euclidean"], "Distance between embeddings.")
_RANDOM = flags.DEFINE_integer(
    "n_random", 50, "Number of random perturbations for each p-value; 0 for no p-values.", lower_bound=0
)
_KEY = flags.DEFINE_string("key_added", "sct_perturb", "Key in obsm and uns to write the results to.")

FLAG_MODULES = cell_flags.WITH_MODEL
flags.mark_flag_as_required("model")


def main(argv: list[str]) -> None:
    """Perturb the cells of the input file and write the output file."""
    from sct.commands import tables
    from sct.tl.perturbation import perturb

    target = cell_flags.checked_output()
    adata, key = tables.read(cell_flags.INPUT.value), _KEY.value
    genes = [each.split("+") for each in _GENES.value]
    perturb(
        adata, model_flags.model(), genes, mode=_MODE.value, targets=_TARGETS.value,  # type: ignore[arg-type]
        metric=_METRIC.value,  # type: ignore[arg-type]
        n_random=_RANDOM.value, key_added=key, **cell_flags.options(),
    )  # fmt: skip
    added = {"obsm": [key], "uns": [key, *cell_flags.scales(adata)]}
    tables.write(adata, cell_flags.INPUT.value, target, added, [key])
    effects = adata.uns[key]["effects"]
    messages.info(
        f"{'effect':>10} {'p-value':>8} {'q-value':>8} {'expressed':>9} {'random':>7}  perturbation"
    )
    for name, row in effects.sort_values("p_value", kind="stable").iterrows():
        messages.info(
            f"{row['effect']:>10.4g} {row['p_value']:>8.4f} {row['q_value']:>8.4f} {row['fraction_expressed']:>9.1%} "
            f"{row['null_fraction']:>7.1%}  {name}"
        )
    messages.info(
        "expressed, random: cells that express the genes, or the random genes they are compared with"
    )
    if _TARGETS.value:
        messages.info(
            f"{'expected':>10} {'change':>10} {'p-value':>8}  perturbation, target (mean raw counts)"
        )
        for _, row in adata.uns[key]["targets"].iterrows():
            messages.info(
                f"{row['expected']:>10.4g} {row['change']:>+10.3g} {row['p_value']:>8.4f}  {row['perturbation']}, "
                f"{row['gene']}"
            )
    messages.info(f'obsm["{key}"] in {target}' if target.suffix == ".h5ad" else f"{key} in {target}")
