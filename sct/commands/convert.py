"""Turn foreign weights into a model folder.

    sct convert --from=haiku-sct --input=DIR --output=MODEL_DIR
    sct convert --from=haiku-sct --input=DIR --genes=genes.tsv --output=MODEL_DIR --dtype=bfloat16

haiku-sct: the published sCellTransformer weights. DIR holds `config.json` and `params.joblib` (itself or in
`jax_params/`), and for the gene order `ensembl_id_vocab.json` and `protein_gene_map.json`. Nothing that the
files ask for is executed. In a clone, `python -m launch.convert` is the same program.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from sct.errors import ConfigError

_FROM = flags.DEFINE_enum("from", None, ["haiku-sct"], "Format of the weights.")
_INPUT = flags.DEFINE_string("input", None, "Folder of the weights.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model folder to write.", required=True)
_GENES = flags.DEFINE_string(
    "genes",
    None,
    "Gene order where the weights have none: a vocabulary file, or 'none' to number the positions.",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the written arrays.")
flags.mark_flag_as_required("from")


def main(argv: list[str]) -> None:
    """Convert as the flags say."""
    from sct.data.genes import GeneVocabulary
    from sct.weights import haiku_sct, model_folder

    source, target = (Path(flag.value).expanduser().resolve() for flag in (_INPUT, _OUTPUT))
    if target.is_relative_to(source):
        raise ConfigError(
            f"the output {target} is the input folder or lies inside of it: choose another --output."
        )
    model_folder.check_target(target)
    numbered = _GENES.value == "none"
    genes = GeneVocabulary.load(Path(_GENES.value).expanduser()) if _GENES.value and not numbered else None
    model = haiku_sct.convert(source, genes, numbered)
    model.save_pretrained(target, dtype=_DTYPE.value)
    print(haiku_sct.NOTICE)
    print(f"model folder: {_OUTPUT.value}")
