"""Convert published weights to a model folder, or a model folder to the format of another project.

    sct convert --from=FORMAT --input=DIR --output=MODEL_DIR
    sct convert --from=FORMAT --input=DIR --genes=genes.tsv --output=MODEL_DIR --dtype=bfloat16
    sct convert --from=sct --to=FORMAT --input=MODEL_DIR --output=DIR

Writes a model folder, which `sct.load` reads. With --to=FORMAT, writes a folder in that format instead. `sct models`
lists the formats, the published weights in each format, and the files that DIR must contain. No code in these files is
executed.

In a clone, `python -m launch.convert` is the same program.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from sct import messages, outputs
from sct.commands import output_flags
from sct.commands.flag_errors import FlagError, nearest
from sct.errors import ConfigError

if TYPE_CHECKING:
    from sct.families import Converter

OWN = "sct"  # the format of a model folder
_FROM = flags.DEFINE_string("from", None, f"Format of the input; {OWN} means a model folder.")
_TO = flags.DEFINE_string(
    "to", OWN, f"Format of the output; {OWN} means a model folder. Other formats need --from={OWN}."
)
_INPUT = flags.DEFINE_string("input", None, "Folder with the weights.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_GENES = flags.DEFINE_string(
    "genes",
    None,
    "Gene order, for weights without one: a vocabulary file, or 'none' to number the genes.",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Data type of the written arrays.")
flags.mark_flag_as_required("from")

FLAG_MODULES = ("sct.commands.output_flags",)
_WEIGHTS = (".safetensors", ".bin", ".joblib", ".pt")


def main(argv: list[str]) -> None:
    """Convert the input folder to the output folder, according to the flags."""
    from sct import families
    from sct.data.genes.vocabulary import GeneVocabulary
    from sct.weights import model_folder

    source, target = (Path(flag.value).expanduser().resolve() for flag in (_INPUT, _OUTPUT))
    if target.is_relative_to(source):
        raise ConfigError(
            f"--output is {target}, which is the input folder or a folder inside it: choose another --output."
        )
    known = families.converters()
    written = [name for name, each in known.items() if each.write is not None]
    for flag, names in ((_FROM, [*known, OWN]), (_TO, [OWN, *written])):
        if flag.value not in names:
            meant = nearest(str(flag.value), names)
            hint = f" (did you mean {meant}?)" if meant else ""
            raise FlagError(f"--{flag.name}={flag.value} is wrong: choose from {', '.join(names)}{hint}.")
    if (_FROM.value == OWN) == (_TO.value == OWN):
        raise FlagError(
            f"--from={_FROM.value} cannot be combined with --to={_TO.value}, because exactly one of the two must be "
            f"{OWN}: use --to={OWN} with --from={' or --from='.join(known)}, or --from={OWN} with "
            f"--to={' or --to='.join(written)}."
        )
    numbered = [name for name, each in known.items() if each.takes_genes]
    if _GENES.value and _FROM.value not in numbered:
        raise FlagError(
            f"--genes only works with --from={'|'.join(numbered)}, but --from is {_FROM.value}: remove --genes."
        )
    model_folder.check_target(target)
    outputs.check_folder(target, "--output", output_flags.OVERWRITE.value, _least_bytes(source))
    if _FROM.value == OWN:
        _write(known[str(_TO.value)], source, target)
        messages.info(f"{known[str(_TO.value)].title or _TO.value} folder: {_OUTPUT.value}")
        return
    converter = known[str(_FROM.value)]
    numbered_genes = _GENES.value == "none"
    named = _GENES.value and not numbered_genes
    genes = GeneVocabulary.load(Path(str(_GENES.value)).expanduser()) if named else None
    converter.read(source, target, _DTYPE.value, genes, numbered_genes)
    if converter.notice:
        messages.info(converter.notice)
    messages.info(f"model folder: {_OUTPUT.value}")


def _least_bytes(source: Path) -> int:
    """Estimate the minimum size of the output in bytes.

    The estimate is half the size of the smallest set of weights files in the input folder, or a quarter with
    --dtype=bfloat16.
    """
    folders = [folder for folder in (source, source / "jax_params") if folder.is_dir()]
    files = [file for folder in folders for file in folder.iterdir()]
    sets = [sum(outputs.size_of(file) for file in files if file.suffix == suffix) for suffix in _WEIGHTS]
    return min(filter(None, sets), default=0) // (2 if _DTYPE.value == "float32" else 4)


def _write(converter: Converter, source: Path, target: Path) -> None:
    """Convert a model folder to the format that --to names."""
    import jax

    from sct.weights.load import load

    assert converter.write is not None
    # A model may be larger than an accelerator's memory, and nothing is computed here.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        converter.write(load(source), target, _DTYPE.value)
