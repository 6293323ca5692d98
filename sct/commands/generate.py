"""Generate cells with a model of cell sentences, as an .h5ad file.

    sct generate --model=runs/c2s --cell_type="B cell" --n=100 --output=generated.h5ad
    sct generate --model=runs/c2s --label="cell type=B cell" --label=exposure=acute --n=100 --output=generated.h5ad

X of the output is log10(1 + counts per 10,000); obs has the sentences, the share of their words that are genes, and
whether the model ended them itself. In a clone, `python -m launch.generate` is the same program.
"""

from __future__ import annotations

from absl import flags

from sct.commands import output_flags
from sct.errors import ConfigError

_MODEL = flags.DEFINE_string("model", None, "Model folder, run folder or hub id.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, ".h5ad file to write.", required=True)
_CELL_TYPE = flags.DEFINE_multi_string("cell_type", [], "Cell type; may be given several times.")
_TISSUE = flags.DEFINE_multi_string("tissue", [], "Tissue; may be given several times.")
_LABELS = flags.DEFINE_multi_string(
    "label", [], "NAME=VALUE of labels that the model learned together; give the flag for each of them."
)
_TEXT = flags.DEFINE_string("text", None, "Abstract of a study.")
_N = flags.DEFINE_integer("n", 100, "Cells of each.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same cells.")
_FIT = flags.DEFINE_string("fit", "all", "Training study whose line turns ranks into expression.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 for the best word each time; 0.7 by default.")
_TOP_P = flags.DEFINE_float("top_p", None, "Probability of the words that are drawn from; 0.9 by default.")
_SIZE = flags.DEFINE_integer("batch_size", 32, "Cells at once.")

FLAG_MODULES = ("sct.commands.output_flags",)
_BYTES_PER_CELL = 1000  # of a sentence of a hundred genes and their values: the least


def main(argv: list[str]) -> None:
    """Generate as the flags say."""
    from sct.commands import tables
    from sct.tl.sentences import generate_cells

    cells = _N.value * max(1, len(_CELL_TYPE.value) * max(1, len(_TISSUE.value)))
    target = tables.check_output(
        _OUTPUT.value, overwrite=output_flags.OVERWRITE.value, needed=max(cells, 0) * _BYTES_PER_CELL
    )
    pairs = [text.partition("=") for text in _LABELS.value]
    if any(not (name.strip() and mark and value.strip()) for name, mark, value in pairs):
        raise ConfigError(f"--label={' --label='.join(_LABELS.value)} is not of the form NAME=VALUE.")
    adata = generate_cells(
        _MODEL.value,
        cell_type=_CELL_TYPE.value or None,
        tissue=_TISSUE.value or None,
        labels={name.strip(): value.strip() for name, _, value in pairs} or None,
        text=_TEXT.value,
        n=_N.value,
        seed=_SEED.value,
        fit=_FIT.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        batch_size=_SIZE.value,
    )
    with tables.replacing(target) as temporary:
        adata.write_h5ad(temporary)
    shares = adata.obs[["valid_share", "unique_share"]].mean()
    print(
        f"{adata.n_obs:,} cells of {adata.obs['n_words'].mean():.0f} words on average; {shares.iloc[0]:.1%} of the "
        f"words are genes of the model, {shares.iloc[1]:.1%} different ones"
    )
    print(f"cells in {target}")
