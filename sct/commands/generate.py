"""Generate cells with a model of cell sentences.

    sct generate --model=runs/c2s --cell_type="B cell" --n=100 --output=generated.h5ad
    sct generate --model=runs/c2s --label="cell type=B cell" --label=exposure=acute --n=100 --output=generated.h5ad

Writes an .h5ad file with log10(1 + counts per 10,000) in X. obs has the sentence of each cell, the fraction of its
words that are genes, and whether the model ended the sentence itself, before the length limit. In a clone,
`python -m launch.generate` is the same program.
"""

from __future__ import annotations

from absl import flags

from sct import messages
from sct.commands import model_flags, output_flags
from sct.commands.flag_errors import FlagError

_OUTPUT = flags.DEFINE_string("output", None, ".h5ad file to write.", required=True)
_CELL_TYPE = flags.DEFINE_multi_string("cell_type", [], "Cell type to generate.")
_TISSUE = flags.DEFINE_multi_string("tissue", [], "Tissue to generate cells of.")
_LABELS = flags.DEFINE_multi_string(
    "label", [], "Label of the cells to generate; give a value for each label that the model was trained on."
)
_ABSTRACT = flags.DEFINE_string("abstract", None, "Abstract of a study to generate cells of.")
_N = flags.DEFINE_integer(
    "n", 100, "Number of cells for each combination of cell type and tissue.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed: the same seed gives the same cells.")
_FIT = flags.DEFINE_string(
    "fit",
    "all",
    "Training study whose linear fit converts ranks to expression; all: the fit over all studies.",
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "Sampling temperature; 0: always the most likely word. Default: 0.7.",
    lower_bound=0.0,
)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Nucleus sampling: total probability (0 to 1) of the words to sample from. Default: 0.9.",
    lower_bound=0.0, upper_bound=1.0,
)  # fmt: skip
_SIZE = flags.DEFINE_integer("batch_size", 32, "Number of cells generated at once.", lower_bound=1)

FLAG_MODULES = ("sct.commands.model_flags", "sct.commands.output_flags", "sct.commands.device_flag")
flags.mark_flag_as_required("model")
RENAMED_FLAGS = {"text": "abstract"}
_BYTES_PER_CELL = 1000  # lower limit: a sentence of a hundred genes, and their values


def main(argv: list[str]) -> None:
    """Generate cells and write the output file."""
    from sct.commands import tables
    from sct.tl.sentences import generate_cells

    cells = _N.value * max(1, len(_CELL_TYPE.value) * max(1, len(_TISSUE.value)))
    target = tables.check_output(
        _OUTPUT.value, overwrite=output_flags.OVERWRITE.value, needed=max(cells, 0) * _BYTES_PER_CELL
    )
    pairs = [text.partition("=") for text in _LABELS.value]
    for text, (name, mark, value) in zip(_LABELS.value, pairs, strict=True):
        if not (name.strip() and mark and value.strip()):
            raise FlagError(f"--label={text} is wrong: write each label as --label=NAME=VALUE.")
    adata = generate_cells(
        model_flags.model(),
        cell_type=_CELL_TYPE.value or None,
        tissue=_TISSUE.value or None,
        labels={name.strip(): value.strip() for name, _, value in pairs} or None,
        text=_ABSTRACT.value,
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
    messages.info(
        f"{adata.n_obs:,} cells of {adata.obs['n_words'].mean():.0f} words on average; {shares.iloc[0]:.1%} of the "
        f"words are genes of the model, and {shares.iloc[1]:.1%} are distinct genes"
    )
    messages.info(f"cells in {target}")
