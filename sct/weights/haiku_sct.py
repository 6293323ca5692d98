"""Convert the published sCellTransformer weights (Haiku parameters) to a model folder of this project.

The tables below describe the keys and shapes of the published parameters; no code of the published implementation is
used. The published weights have the license CC BY-NC-SA 4.0, which also applies to the converted model.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import CheckpointError, ConfigError
from sct.models.sct_config import SCTConfig
from sct.nn.paths import unflatten
from sct.weights.pretrained import DATA_OPTIONS, Pretrained, default_card, expected_shapes, match

LICENSE = "cc-by-nc-sa-4.0"
NOTICE = (
    "The published sCellTransformer weights have the license CC BY-NC-SA 4.0: you may use and share them "
    "only for non-commercial purposes, with attribution and under the same license. The license also applies to the "
    "converted model."
)

# Rows: pattern of the Haiku module name (without the model name), parameter path in this project, and Haiku parameter
# name -> parameter name in this project. Each `{}` is filled with a group of the pattern.
_NORM = {"scale": "scale", "offset": "bias"}
_LAYER = {"w": "kernel", "b": "bias"}
_RULES: tuple[tuple[str, str, dict[str, str]], ...] = (
    (r"~/embed", "token_embed", {"embeddings": "embedding"}),
    (r"spatial_encoding/~/spatial_fully_connected", "spatial", _LAYER),
    (r"stem/conv1_d", "stem/conv", _LAYER),
    (r"conv_block_(\d+)/conv_block/layer_norm", "down_{}/block/norm", _NORM),
    (r"conv_block_(\d+)/conv_block/conv1_d", "down_{}/block/conv", _LAYER),
    (r"conv_block_(\d+)/residual_conv_block/conv_block/layer_norm", "down_{}/residual/norm", _NORM),
    (r"conv_block_(\d+)/residual_conv_block/conv_block/conv1_d", "down_{}/residual/conv", _LAYER),
    (r"attention_layer_(\d+)/~/self_attention_layer_norm", "transformer_{}/attention_norm", _NORM),
    (r"attention_layer_(\d+)/~/final_layer_norm", "transformer_{}/mlp_norm", _NORM),
    (r"attention_layer_(\d+)/~/self_attention/(query|key|value)", "transformer_{}/attention/{}", _LAYER),
    (r"attention_layer_(\d+)/~/self_attention/mha_output", "transformer_{}/attention/out", _LAYER),
    (r"attention_layer_(\d+)/~/fc1", "transformer_{}/mlp/gate+up", _LAYER),
    (r"attention_layer_(\d+)/~/fc2", "transformer_{}/mlp/down", _LAYER),
    (r"deconv_block_(\d+)/de_conv_block/layer_norm", "up_{}/block/norm", _NORM),
    (r"deconv_block_(\d+)/de_conv_block/conv1_d_transpose", "up_{}/block/conv", _LAYER),
    (r"deconv_block_(\d+)/residual_de_conv_block/de_conv_block/layer_norm", "up_{}/residual/norm", _NORM),
    (
        r"deconv_block_(\d+)/residual_de_conv_block/de_conv_block/conv1_d_transpose",
        "up_{}/residual/conv",
        _LAYER,
    ),
)


def read_params(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Read the file `params.joblib` without running code from it.

    joblib files are pickles, and a pickle can run arbitrary code. This reader allows only plain containers and numeric
    NumPy arrays.

    Returns
    -------
    Arrays by Haiku module name and parameter name.

    Raises
    ------
    CheckpointError
        The file is not a joblib file, holds arrays of objects, or needs a Python object that is neither a plain
        container nor a numeric array. The message names this object.
    """
    import pickle

    from joblib import numpy_pickle

    class PlainArray(numpy_pickle.NumpyArrayWrapper):
        """Array in a joblib file. An array of objects is refused, because joblib would unpickle its elements."""

        def read_array(self, unpickler: Any, *args: Any) -> np.ndarray:
            if self.dtype.hasobject:
                raise CheckpointError(
                    f"{path} holds an array of Python objects, which can run code when read: download the published "
                    "file again."
                )
            return super().read_array(unpickler, *args)

    allowed = {
        ("joblib.numpy_pickle", "NumpyArrayWrapper"): PlainArray,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    class Unpickler(numpy_pickle.NumpyUnpickler):
        """Read a pickle that holds only plain containers and numeric arrays; refuse every other object."""

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise CheckpointError(
                    f"{path} would load {module}.{name} when it is read, but a file of weights needs only arrays: the "
                    "file may be malicious, so download the published file again."
                )
            return allowed[module, name]

    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif data[:1] == b"\x78":
            data = zlib.decompress(data)
        stream = io.BytesIO(data)
        try:
            loaded = Unpickler(str(path), stream, ensure_native_byte_order=True).load()
        except TypeError as error:
            if "ensure_native_byte_order" not in str(error):
                raise
            loaded = Unpickler(str(path), stream).load()  # joblib before 1.5
    except CheckpointError:
        raise
    except (pickle.UnpicklingError, zlib.error, EOFError, ValueError, TypeError, KeyError, AttributeError,
            IndexError, OSError) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} is not a joblib file of arrays ({error}): download the published file again."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str)
        and isinstance(leaves, dict)
        and all(isinstance(name, str) and isinstance(leaf, np.ndarray) for name, leaf in leaves.items())
        for key, leaves in loaded.items()
    ):
        raise CheckpointError(
            f"{path} does not hold Haiku parameters (a dict of dicts of arrays): pass the published params.joblib."
        )
    return loaded


def convert_params(
    params: Mapping[str, Mapping[str, np.ndarray]], hidden_layers: int, source: str
) -> dict[str, np.ndarray]:
    """Convert Haiku parameters to the parameter paths and array shapes of this project.

    Convolution biases (out, 1) lose their last axis. Kernels of transposed convolutions (k, out, in) become
    (k, in, out). `fc1` is split into the gate and the up projection.

    Parameters
    ----------
    params
        Arrays by Haiku module name and parameter name.
    hidden_layers
        Number of hidden layers in the prediction head.
    source
        File name for error messages.

    Returns
    -------
    float32 arrays by parameter path.

    Raises
    ------
    CheckpointError
        The file holds several models, a key is not in the architecture, two keys map to one parameter, or an array has
        a wrong rank, a wrong dtype, NaN or infinity. The message lists all problems.
    """
    models = sorted({key.partition("/")[0] for key in params})
    if len(models) > 1:
        raise CheckpointError(
            f"{source} holds the parameters of {len(models)} models ({', '.join(models[:5])}), but must hold one "
            "model: save the parameters of each model to a separate file."
        )
    converted: dict[str, np.ndarray] = {}
    made_of: dict[str, list[str]] = {}
    problems = []
    for key, leaves in params.items():
        name = key.partition("/")[2]
        for leaf, value in leaves.items():
            target = _target(name, leaf, hidden_layers)
            if target is None:
                problems.append(f"+ {key} {leaf} {value.shape}")
                continue
            made_of.setdefault(target, []).append(f"{key} {leaf}")
            problem = _problem(name, leaf, value)
            if problem:
                problems.append(f"~ {key} {leaf} {problem}")
            else:
                converted |= _converted(name, leaf, value, target)
    problems += [
        f"duplicate: {', '.join(keys)} ({target})" for target, keys in made_of.items() if len(keys) > 1
    ]
    if problems:
        raise CheckpointError(
            f"{source} has {len(problems)} parameters that do not fit the sCT architecture (in the list below, + "
            "marks a parameter that the architecture does not have, and ~ marks a wrong array): use the published "
            "file of this architecture.\n  " + "\n  ".join(problems[:40])
        )
    return {path: np.ascontiguousarray(value) for path, value in converted.items()}


def _problem(name: str, leaf: str, value: np.ndarray) -> str:
    """Check dtype, rank and values of a Haiku array. Return a text that says what is wrong, or '' for a valid array."""
    if value.dtype.kind != "f" or value.dtype.itemsize > 4:
        return f"is {value.dtype} instead of float32"
    convolution = "conv" in name.rpartition("/")[2]
    rank = {"w": 3 if convolution else 2, "b": 2 if convolution else 1, "embeddings": 2}.get(leaf, 1)
    if value.ndim != rank:
        return f"{value.shape} has {value.ndim} axes instead of {rank}"
    if convolution and leaf == "b" and value.shape[1] != 1:
        return f"{value.shape} is not (out, 1)"
    if not np.isfinite(value).all():
        return "has NaN or infinite values"
    return ""


def _converted(name: str, leaf: str, value: np.ndarray, target: str) -> dict[str, np.ndarray]:
    """Convert one Haiku array to parameters of this project, as a dict by parameter path."""
    value = value.astype(np.float32)
    if "conv" in name.rpartition("/")[2]:
        if leaf == "b":
            value = value[:, 0]
        elif name.endswith("transpose"):
            value = value.transpose(0, 2, 1)
    if "gate+up" not in target:
        return {target: value}
    half = value.shape[-1] // 2
    return {
        target.replace("gate+up", "gate"): value[..., :half],
        target.replace("gate+up", "up"): value[..., half:],
    }


def _target(name: str, leaf: str, hidden_layers: int) -> str | None:
    """Return the path of a Haiku parameter in this project, or None if the architecture has no such parameter."""
    head = re.fullmatch(r"linear(?:_(\d+))?", name)
    if head and leaf in _LAYER:
        layer = int(head[1] or 0)
        place = f"hidden_{layer}" if layer < hidden_layers else "logits" if layer == hidden_layers else None
        return f"params/head/{place}/{_LAYER[leaf]}" if place else None
    for pattern, path, leaves in _RULES:
        found = re.fullmatch(pattern, name)
        if found and leaf in leaves:
            return f"params/{path.format(*found.groups())}/{leaves[leaf]}"
    return None


# Field of SCTConfig -> its name in the published config.json.
_OPTIONS = {
    "token_embed_dim": "token_embed_dim",
    "embed_dim": "embed_dim",
    "num_downsamples": "num_downsamples",
    "num_layers": "num_layers",
    "num_heads": "attention_heads",
    "ffn_dim": "ffn_embed_dim",
    "num_hidden_layers_head": "num_hidden_layers_head",
    "use_skip_connection": "use_skip_connection",
    "use_spatial": "use_spatial_information",
    "num_scales": "num_scales",
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
    "layer_norm_eps": "layer_norm_eps",
}
# The published config.json lacks the number of genes and the kernel sizes; the shapes of these parameters give them.
_SIZE_PARAMETERS = {
    "params/down_0/block/norm/scale": "conv_block_0/conv_block/layer_norm scale",
    "params/down_0/block/conv/kernel": "conv_block_0/conv_block/conv1_d w",
    "params/stem/conv/kernel": "stem/conv1_d w",
}


def _option(config: Mapping[str, Any], name: str, kind: type, source: str) -> Any:
    """Look up an option in the published configuration, check its type, and return the option."""
    if name not in config:
        raise CheckpointError(f"{source} has no option {name!r}: use the published config.json.")
    value = config[name]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise CheckpointError(
            f"{source} has {name} = {value!r}, but it must be of type {kind.__name__}: use the published config.json."
        )
    return value


def convert_config(
    config: Mapping[str, Any], converted: Mapping[str, np.ndarray], source: str, params_source: str
) -> SCTConfig:
    """Read the architecture from the published `config.json` and the shapes of the parameters.

    Parameters
    ----------
    config
        Content of the published `config.json`.
    converted
        Arrays by path, from `convert_params`. The shapes of these arrays give the number of genes and the kernel sizes.
    source, params_source
        Names of the two files for error messages.

    Raises
    ------
    CheckpointError
        An option is missing, has a wrong type or contradicts another one, or a parameter that gives the number of genes
        or a kernel size is missing.
    """
    for path, foreign in _SIZE_PARAMETERS.items():
        if path not in converted:
            raise CheckpointError(
                f"{params_source} has no array {foreign}, but its shape is needed to find the size of the model: use "
                "the published params.joblib."
            )
    scale, first, stem = (converted[path] for path in _SIZE_PARAMETERS)
    values = {
        ours: _option(config, theirs, type(getattr(SCTConfig, ours)), source)
        for ours, theirs in _OPTIONS.items()
    }
    try:
        made = SCTConfig(
            num_genes=scale.shape[0],
            num_bins=_option(config, "alphabet_size", int, source) - 2,
            stem_kernel_size=stem.shape[0],
            conv_kernel_size=first.shape[0],
            spatial_encoding="reference",
            **values,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} has options that do not fit together: {error}") from None
    expected = {
        "key_size": made.embed_dim // made.num_heads,
        "pad_token_id": made.pad,
        "mask_token_id": made.mask,
    }
    for name, value in expected.items():
        if config.get(name, value) not in (value, None):
            raise CheckpointError(
                f"{source} has {name} = {config[name]}, but the other options in this file require {value}: use the "
                "published config.json."
            )
    return made


def read_vocabulary(folder: Path, num_genes: int) -> GeneVocabulary | None:
    """Read the gene order of a published model from the two JSON files of the model.

    `ensembl_id_vocab.json` maps Ensembl ids to global indices. `protein_gene_map.json` maps global indices to positions
    among the protein-coding genes. A position without an Ensembl id gets its number as its name.

    Parameters
    ----------
    folder
        Folder of the published model.
    num_genes
        Number of gene positions of the model.

    Returns
    -------
    The vocabulary, or None if the folder has neither file.

    Raises
    ------
    CheckpointError
        Only one of the two files exists, or a file is damaged or does not fit the model.
    """
    files = [folder / "ensembl_id_vocab.json", folder / "protein_gene_map.json"]
    exists = [file.is_file() for file in files]
    if not any(exists):
        return None
    if not all(exists):
        raise CheckpointError(
            f"{files[exists.index(False)]} is missing, but both vocabulary files are needed: add this file, or delete "
            f"{files[exists.index(True)].name} and give --genes."
        )
    try:
        indices, positions = (json.loads(file.read_text()) for file in files)
        coding = {int(index): int(position) for index, position in positions.items()}
        ids = {
            coding[int(index)]: gene.partition(".")[0]
            for gene, index in indices.items()
            if int(index) in coding
        }
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise CheckpointError(
            f"the vocabulary files in {files[0].parent} cannot be read ({error}): download them again, or delete them "
            "and give --genes."
        ) from error
    if not coding or not ids:
        raise CheckpointError(
            f"the vocabulary files in {files[0].parent} contain no genes: download them again, or delete them and "
            "give --genes."
        )
    outside = [position for position in coding.values() if not 0 <= position < num_genes]
    if outside:
        raise CheckpointError(
            f"{files[1]} has the gene position {outside[0]}, but the model has only the positions 0 to "
            f"{num_genes - 1}: use the vocabulary files of this model."
        )
    repeated = [position for position, count in Counter(coding.values()).items() if count > 1]
    if repeated:
        raise CheckpointError(
            f"{files[1]} gives the position {repeated[0]} to several genes, but each gene must have its own position: "
            "use the vocabulary files of this model."
        )
    size = max(coding.values()) + 1
    return numbered([ids.get(position, "") for position in range(size)], "sct-published")


def numbered(ids: list[str], name: str) -> GeneVocabulary:
    """Make a vocabulary from Ensembl ids. A gene with an empty id gets the number of its position as its name."""
    human = GeneVocabulary.human()
    symbols = []
    for position, gene in enumerate(ids):
        known = human.position_of_id.get(gene, -1) if gene else -1
        symbols.append(human.symbols[known] if known >= 0 else gene or f"position_{position}")
    return GeneVocabulary.from_ids(ids, symbols, name=name)


def convert(folder: Path, genes: GeneVocabulary | None = None, numbered_genes: bool = False) -> Pretrained:
    """Convert a published model: its architecture, parameters and gene order.

    Parameters
    ----------
    folder
        Folder with `config.json` and `params.joblib`, directly or in its sub-folder `jax_params`.
    genes
        Gene order, if the folder has no vocabulary files.
    numbered_genes
        Whether each gene gets the number of its position as its name. Use this option for a model whose gene order is
        unknown.

    Returns
    -------
    The converted model.

    Raises
    ------
    CheckpointError
        A file is missing, unsafe or damaged, or the files do not fit each other. The message lists all differences.
    """
    params_file = next(
        (f for f in (folder / "params.joblib", folder / "jax_params" / "params.joblib") if f.is_file()), None
    )
    config_file = next(
        (f for f in (folder / "config.json", folder / "jax_params" / "config.json") if f.is_file()), None
    )
    if params_file is None or config_file is None:
        missing = "params.joblib" if params_file is None else "config.json"
        raise CheckpointError(
            f"there is no {missing} in {folder} or in its sub-folder jax_params: give the folder that contains "
            "params.joblib and config.json."
        )
    try:
        foreign = json.loads(config_file.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{config_file} cannot be read as JSON ({error}): download the published config.json again."
        ) from None
    if not isinstance(foreign, dict):
        raise CheckpointError(
            f"{config_file} holds a {type(foreign).__name__} instead of a JSON object: download the published "
            "config.json again."
        )
    hidden = _option(foreign, "num_hidden_layers_head", int, str(config_file))
    arrays = convert_params(read_params(params_file), hidden, str(params_file))
    config = convert_config(foreign, arrays, str(config_file), str(params_file))
    match(arrays, expected_shapes("sct", config), str(params_file))
    vocabulary = read_vocabulary(folder, config.num_genes)
    if vocabulary is not None and (genes is not None or numbered_genes):
        raise CheckpointError(
            f"{folder} has vocabulary files, and these define the gene order, so --genes has no use: remove --genes."
        )
    vocabulary = vocabulary or genes
    if vocabulary is None:
        if not numbered_genes:
            raise CheckpointError(
                f"{folder} has neither ensembl_id_vocab.json nor protein_gene_map.json, so the gene order is unknown: "
                "give the gene order as --genes=FILE, or use numbers instead of gene names with --genes=none."
            )
        vocabulary = numbered([""] * config.num_genes, "numbered")
    if len(vocabulary) > config.num_genes:
        raise CheckpointError(
            f"the vocabulary has {len(vocabulary)} genes, but the model has only {config.num_genes} gene positions: "
            "give the vocabulary that the model was trained with."
        )
    model = Pretrained("sct", config, unflatten(arrays), vocabulary, license=LICENSE, data=DATA_OPTIONS)
    origin = (
        "## Origin\n\nConverted from the published sCellTransformer weights (Haiku parameters). " + NOTICE
    )
    if vocabulary.name == "numbered":
        origin += " The gene order is unknown: gene positions are named by their numbers."
    return dataclasses.replace(model, card=default_card(model, origin))
