"""Turn foreign weights into a model folder, and back.

    sct convert --from=haiku-sct --input=DIR --output=MODEL_DIR
    sct convert --from=haiku-sct --input=DIR --genes=genes.tsv --output=MODEL_DIR --dtype=bfloat16
    sct convert --from=hf --input=DIR --output=MODEL_DIR
    sct convert --from=sct --to=hf --input=MODEL_DIR --output=DIR

haiku-sct: the published sCellTransformer weights. DIR holds `config.json` and `params.joblib` (itself or in
`jax_params/`), and for the gene order `ensembl_id_vocab.json` and `protein_gene_map.json`. Nothing that the
files ask for is executed.

hf: a text model in the format of Hugging Face: GPT-2, GPT-NeoX (Pythia), LLaMA or BERT, as its `config.json` says. DIR
holds `model.safetensors` or, with the extra `torch`, `pytorch_model.bin`, or several files of one kind and their index;
a tokenizer is taken along. `sct.load` reads such a folder without conversion, too.

In a clone, `python -m launch.convert` is the same program.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from sct import outputs
from sct.commands import output_flags
from sct.errors import ConfigError

_FROM = flags.DEFINE_enum(
    "from", None, ["haiku-sct", "hf", "sct"], "Format of the weights; sct: a model folder."
)
_TO = flags.DEFINE_enum("to", "sct", ["sct", "hf"], "Format to write; hf takes --from=sct.")
_INPUT = flags.DEFINE_string("input", None, "Folder of the weights.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_GENES = flags.DEFINE_string(
    "genes",
    None,
    "Gene order where the weights have none: a vocabulary file, or 'none' to number the positions.",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the written arrays.")
flags.mark_flag_as_required("from")

FLAG_MODULES = ("sct.commands.output_flags",)
_WEIGHTS = (".safetensors", ".bin", ".joblib")


def main(argv: list[str]) -> None:
    """Convert as the flags say."""
    from sct.weights import model_folder

    source, target = (Path(flag.value).expanduser().resolve() for flag in (_INPUT, _OUTPUT))
    if target.is_relative_to(source):
        raise ConfigError(
            f"the output {target} is the input folder or lies inside of it: choose another --output."
        )
    if (_FROM.value == "sct") != (_TO.value == "hf"):
        raise ConfigError(
            f"--from={_FROM.value} --to={_TO.value} is no conversion: from haiku-sct and hf weights become a model "
            "folder (sct), and a model folder becomes hf."
        )
    if _GENES.value and _FROM.value != "haiku-sct":
        raise ConfigError(f"--genes is for --from=haiku-sct alone, not {_FROM.value}: leave it out.")
    model_folder.check_target(target)
    outputs.check_folder(target, "--output", output_flags.OVERWRITE.value, _least_bytes(source))
    {"haiku-sct": _from_haiku, "hf": _from_hf, "sct": _to_hf}[str(_FROM.value)](source, target)
    print(f"{'model folder' if _TO.value == 'sct' else 'Hugging Face folder'}: {_OUTPUT.value}")


def _least_bytes(source: Path) -> int:
    """Bytes that the output has at least: half of the smallest set of weights, a quarter of it in half the type."""
    folders = [folder for folder in (source, source / "jax_params") if folder.is_dir()]
    files = [file for folder in folders for file in folder.iterdir()]
    sets = [sum(outputs.size_of(file) for file in files if file.suffix == suffix) for suffix in _WEIGHTS]
    return min(filter(None, sets), default=0) // (2 if _DTYPE.value == "float32" else 4)


def _from_haiku(source: Path, target: Path) -> None:
    from sct.data.genes import GeneVocabulary
    from sct.weights import haiku_sct

    numbered = _GENES.value == "none"
    genes = GeneVocabulary.load(Path(_GENES.value).expanduser()) if _GENES.value and not numbered else None
    haiku_sct.convert(source, genes, numbered).save_pretrained(target, dtype=_DTYPE.value)
    print(haiku_sct.NOTICE)


def _from_hf(source: Path, target: Path) -> None:
    from sct.weights import hf

    hf.convert(source, target, dtype=_DTYPE.value)
    print(hf.NOTICE)


def _to_hf(source: Path, target: Path) -> None:
    import jax

    from sct.weights import hf
    from sct.weights.load import load

    # Accelerators may be smaller than a model, and have nothing to compute here.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        hf.save(load(source), target, dtype=_DTYPE.value)
