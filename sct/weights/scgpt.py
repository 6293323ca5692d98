"""Convert scGPT weights to a model folder of this project, and back.

The tables below describe the keys and shapes of the published weights; no code of the published implementation is used.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sct import messages
from sct.atomic import atomic_folder
from sct.data.genes.alignment import ENSEMBL, look_up
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import CheckpointError, ConfigError
from sct.extras import load_extra
from sct.models.cell_encoder import STATISTICS
from sct.models.cell_encoder_config import MVC, CellEncoderConfig
from sct.nn.paths import flatten, unflatten
from sct.weights.hf.files import TorchReader
from sct.weights.hf.folder import NOTICE
from sct.weights.hf.maps import Entry, Leaves, Row, located
from sct.weights.model_folder import INDEX, WEIGHTS, FolderReader, read_json
from sct.weights.pretrained import Pretrained, default_card, expected_shapes, match

__all__ = ["NOTICE", "convert", "save"]

FAMILY = "scgpt"
ARGS, VOCAB, TORCH_FILE = "args.json", "vocab.json", "best_model.pt"
CLS, PAD = "<cls>", "<pad>"
_SPECIAL = re.compile(r"<[^<>]*>")
PUBLISHED = "published"  # entry of the data section: what an export needs and our own files do not hold
MAX_TOKENS = 1200  # maximum number of tokens of a cell, CLS included, in the published models
# Spellings of the fused projection of attention.
_FUSED_KEYS = {
    "Wqkv": ("self_attn.Wqkv", {"kernel": ("weight", True), "bias": ("bias", False)}),
    "in_proj": ("self_attn", {"kernel": ("in_proj_weight", True), "bias": ("in_proj_bias", False)}),
}
_TABLE: Leaves = {"embedding": ("weight", False)}
_NORM: Leaves = {"scale": ("weight", False), "bias": ("bias", False)}
_LINEAR: Leaves = {"kernel": ("weight", True), "bias": ("bias", False)}
_LAYER = "transformer_encoder.layers.{}"
_DOMAIN = "dsbn.bns.{}"
_COUNTED = re.compile(r"dsbn\.bns\.\d+\.num_batches_tracked")  # number of training steps, which nothing reads


def _value_head(ours: str, theirs: str) -> tuple[Row, ...]:
    names = ("hidden_0", "hidden_1", "out")
    return tuple((f"{ours}/{name}", f"{theirs}.{2 * at}", _LINEAR) for at, name in enumerate(names))


def _label_head(ours: str, theirs: str, layers: int) -> tuple[Row, ...]:
    rows: list[Row] = []
    for at in range(layers - 1):
        rows.append((f"{ours}/hidden_{at}", f"{theirs}._decoder.{3 * at}", _LINEAR))
        rows.append((f"{ours}/norm_{at}", f"{theirs}._decoder.{3 * at + 2}", _NORM))
    return (*rows, (f"{ours}/out", f"{theirs}.out_layer", _LINEAR))


def _rows(config: CellEncoderConfig, spelling: str) -> tuple[Row, ...]:
    """Return the table of modules: path in this project, name in the published files, and parameters."""
    attention, fused = _FUSED_KEYS[spelling]
    inner = config.mvc.startswith("inner product")
    return (
        ("gene", "encoder.embedding", _TABLE),
        ("gene_norm", "encoder.enc_norm", _NORM),
        ("flag", "flag_encoder", _TABLE),
        ("value_in", "value_encoder.linear1", _LINEAR),
        ("value_out", "value_encoder.linear2", _LINEAR),
        ("bin", "value_encoder.embedding", _TABLE),
        ("value_norm", "value_encoder.norm" if config.values == "continuous" else "value_encoder.enc_norm", _NORM),
        ("batch", "batch_encoder.embedding", _TABLE),
        ("batch_norm", "batch_encoder.enc_norm", _NORM),
        ("layers/attention/query+key+value", f"{_LAYER}.{attention}", fused),
        ("layers/attention/out", f"{_LAYER}.self_attn.out_proj", _LINEAR),
        ("layers/mlp/up", f"{_LAYER}.linear1", _LINEAR),
        ("layers/mlp/down", f"{_LAYER}.linear2", _LINEAR),
        ("layers/attention_norm", f"{_LAYER}.norm1", _NORM),
        ("layers/mlp_norm", f"{_LAYER}.norm2", _NORM),
        *_value_head("value_head", "decoder.fc"),
        *_value_head("zero_head", "decoder.zero_logit"),
        *_label_head("classifier", "cls_decoder", config.classifier_layers),
        ("mvc_head/query", "mvc_decoder.gene2query", _LINEAR),
        ("mvc_head/weights", "mvc_decoder.W", _LINEAR),
        ("mvc_head/zero_weights", "mvc_decoder.W_zero_logit", _LINEAR),
        *(() if inner else (
            ("mvc_head/hidden", "mvc_decoder.fc1", _LINEAR),
            ("mvc_head", "mvc_decoder.hidden_activation", {"slope": ("weight", False)}),
            ("mvc_head/out", "mvc_decoder.fc2", _LINEAR),
        )),
        *_label_head("discriminator", "grad_reverse_discriminator", 3),
    )  # fmt: skip


def _entries(config: CellEncoderConfig, spelling: str, shapes: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the location in the published files of each parameter of a model, by path.

    Raises
    ------
    CheckpointError
        The format does not support a parameter, such as an adapter.
    """
    found = located(_rows(config, spelling), config.num_layers, shapes)
    domains = (("domain_norm", _DOMAIN, _NORM),)
    found |= located(domains, config.num_batches, shapes)
    running: Leaves = {"mean": ("running_mean", False), "variance": ("running_var", False)}
    found |= located((("domain_norm", _DOMAIN, running),), config.num_batches, shapes, root=STATISTICS)
    unknown = sorted(set(shapes) - set(found))
    if unknown:
        raise CheckpointError(
            f"the scGPT format does not support the parameter {unknown[0]}: if this is an adapter, merge it into the "
            "model first (sct.models.lora.merge); otherwise save a model folder with save_pretrained."
        )
    return found


def _reader(folder: Path) -> FolderReader | TorchReader:
    if (folder / TORCH_FILE).is_file():
        return TorchReader(folder, TORCH_FILE)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return FolderReader(folder)
    raise CheckpointError(
        f"{folder} has neither {TORCH_FILE} nor {WEIGHTS}: give a folder with {ARGS}, {VOCAB} and one of these files."
    )


# Option in args.json -> field of the configuration and its type. Options that a folder lacks keep the default.
_OPTIONS: Mapping[str, tuple[str, type]] = {
    "embsize": ("embed_dim", int),
    "nheads": ("num_heads", int),
    "d_hid": ("ffn_dim", int),
    "nlayers": ("num_layers", int),
    "dropout": ("dropout", float),
    "n_bins": ("num_bins", int),
    "pad_value": ("pad_value", float),
    "mask_value": ("mask_value", float),
    "input_emb_style": ("values", str),
    "cell_emb_style": ("cell_embedding", str),
    "n_layers_cls": ("classifier_layers", int),
}
_NEEDED = ("embsize", "nheads", "d_hid", "nlayers")


def _options(args: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Read the options of the architecture from `args.json`, as a dict by field of the configuration."""
    values: dict[str, Any] = {}
    for theirs, (ours, kind) in _OPTIONS.items():
        if theirs not in args:
            if theirs in _NEEDED:
                raise CheckpointError(f"{source} has no option {theirs!r}: use the {ARGS} of this model.")
            continue
        value = args[theirs]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(
                f"{source} has {theirs} = {args[theirs]!r}, but it must be of type {kind.__name__}: use the {ARGS} of "
                "this model."
            )
        values[ours] = value
    if args.get("pre_norm") or args.get("norm_scheme") == "pre":
        values["norm"] = "pre"
    return values


def _mvc(shapes: Mapping[str, Any], args: Mapping[str, Any], width: int) -> str:
    """Return the form of the MVC head, from the arrays in the files; "" for no head."""
    if "mvc_decoder.gene2query.weight" not in shapes:
        return ""
    if "mvc_decoder.fc1.weight" in shapes:
        return "concat query" if shapes["mvc_decoder.fc1.weight"].shape[-1] > width else "sum query"
    # Only training tells the two forms with an inner product apart.
    style = args.get("mvc_decoder_style")
    return style if style in MVC and str(style).startswith("inner product") else "inner product"


def _config(
    args: Mapping[str, Any], vocab: Mapping[str, int], shapes: Mapping[str, Any], folder: Path
) -> CellEncoderConfig:
    """Make the configuration from the options, the names of genes, and the names and shapes of the arrays."""

    def rows(name: str) -> int:
        return int(shapes[name].shape[0]) if name in shapes and len(shapes[name].shape) else 0

    values = _options(args, folder / ARGS)
    table = rows("encoder.embedding.weight")
    if not table:
        raise CheckpointError(
            f"{folder} has no array encoder.embedding.weight, which holds the embeddings of genes: give the folder of "
            "an scGPT model."
        )
    if "value_encoder.embedding.weight" in shapes:
        bins = rows("value_encoder.embedding.weight") - 2
        found = {
            "values": "category",
            "num_bins": bins,
            "pad_value": float(bins),
            "mask_value": float(bins + 1),
        }
    elif "value_encoder.linear1.weight" in shapes:
        found = {"values": "continuous"}
    else:
        found = {"values": "scaling"}
    for name, value in found.items():
        if values.get(name, value) != value:
            theirs = next(option for option, (ours, _) in _OPTIONS.items() if ours == name)
            raise CheckpointError(
                f"{folder / ARGS} has {theirs} = {args[theirs]!r}, but the weights are those of {value!r}: use the "
                f"{ARGS} of this model."
            )
    domains = len({key.split(".")[2] for key in shapes if re.match(r"dsbn\.bns\.\d+\.", key)})
    labels = rows("batch_encoder.embedding.weight")
    discriminated = rows("grad_reverse_discriminator.out_layer.weight")
    pad = args.get("pad_token", PAD)
    for token in (pad, CLS):
        if token not in vocab:
            raise CheckpointError(
                f"{folder / VOCAB} has no token {token!r}, but the model needs its row: use the {VOCAB} of this model."
            )
    try:
        return CellEncoderConfig(**{
            **values, **found, "vocab_size": table, "pad_id": vocab[pad], "cls_id": vocab[CLS],
            "num_classes": rows("cls_decoder.out_layer.weight"), "num_batches": labels or domains or discriminated,
            "use_batch_labels": labels > 0 or not (domains or discriminated), "dab": discriminated > 0,
            "domain_norm": "" if not domains else "affine" if "dsbn.bns.0.weight" in shapes else "plain",
            "mvc": _mvc(shapes, args, int(values["embed_dim"])),
            "explicit_zero": "decoder.zero_logit.0.weight" in shapes or "mvc_decoder.W_zero_logit.weight" in shapes,
            "value_head": "decoder.fc.0.weight" in shapes, "flags": "flag_encoder.weight" in shapes,
        })  # fmt: skip
    except ConfigError as error:
        raise CheckpointError(f"the files in {folder} do not fit together: {error}") from None


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    rows = list(vocab.values())
    if not rows or not all(type(row) is int and row >= 0 for row in rows) or len(set(rows)) < len(rows):
        raise CheckpointError(
            f"{path} must give each name its own row, counted from 0, but it does not: use the {VOCAB} of this model."
        )
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def _vocabulary(names: list[str]) -> tuple[GeneVocabulary, int]:
    """Make the gene vocabulary from published gene names, in the given order.

    A name that means a gene of the shipped human table gets the id and the approved symbol of this gene. If two names
    mean the same gene, the approved name counts, and the other one stays a gene of its own, as does a name that the
    table does not have.

    Returns
    -------
    The vocabulary, and the number of names that the table does not have.
    """
    human = GeneVocabulary.human()
    positions = look_up(human, names)[0].tolist()
    owner: dict[int, int] = {}
    for at, (name, position) in enumerate(zip(names, positions, strict=True)):
        approved = position >= 0 and name in (human.symbols[position], human.ensembl_ids[position])
        if position >= 0 and (position not in owner or approved):
            owner[position] = at
    ids, symbols = [], []
    for at, (name, position) in enumerate(zip(names, positions, strict=True)):
        known = position >= 0 and owner[position] == at
        ids.append(human.ensembl_ids[position] if known else name if ENSEMBL.fullmatch(name) else "")
        symbols.append(human.symbols[position] if known else name)
    return GeneVocabulary.from_ids(ids, symbols, name="scgpt-published"), positions.count(-1)


# What a folder may lack: field of the configuration -> name of the part.
_PARTS = {
    "value_head": "head for masked values", "mvc": "MVC head", "num_classes": "classifier",
    "explicit_zero": "zero probabilities", "num_batches": "batch labels", "dab": "batch discriminator",
    "domain_norm": "domain-specific batch norm", "flags": "flags of generated genes",
}  # fmt: skip


def convert(folder: Path) -> Pretrained:
    """Convert a folder with scGPT weights: its architecture, parameters and genes.

    Parameters
    ----------
    folder
        Folder with `args.json`, `vocab.json`, and `best_model.pt` (needs the extra `torch`) or `model.safetensors`.
        Both spellings of the attention weights work: `self_attn.Wqkv.weight` and `self_attn.in_proj_weight`.

    Returns
    -------
    The converted model. Its model card lists the parts that the folder lacks.

    Raises
    ------
    CheckpointError
        A file is missing, unsafe or damaged, or the files do not fit each other. The message lists all differences.
    MissingExtraError
        torch is needed but not installed.
    """
    args, vocab = read_json(folder / ARGS), _read_vocab(folder / VOCAB)
    with _reader(folder) as reader:
        shapes = {name: shape for name, shape in reader.shapes.items() if not _COUNTED.fullmatch(name)}
        config = _config(args, vocab, shapes, folder)
        spelling = "in_proj" if any(key.endswith(".in_proj_weight") for key in shapes) else "Wqkv"
        ours = expected_shapes(FAMILY, config)
        entries = _entries(config, spelling, ours)
        expected = {
            name: np.empty(entry.shape(ours[path].shape), np.float32)
            for path, entry in entries.items()
            for name in entry.names
        }
        match(shapes, expected, str(folder))
        arrays = {path: _read(reader, entry, ours[path].shape) for path, entry in entries.items()}
    special = {name: row for name, row in vocab.items() if _SPECIAL.fullmatch(name)}
    names = [name for name in vocab if name not in special]
    if max(vocab.values()) >= config.vocab_size:
        raise CheckpointError(
            f"{folder / VOCAB} has the row {max(vocab.values())}, but the weights have only {config.vocab_size} rows: "
            f"use the {VOCAB} of this model."
        )
    genes, unknown = _vocabulary(names)
    renamed = {
        key: name
        for key, symbol, name in zip(genes.keys, genes.symbols, names, strict=True)
        if symbol != name
    }
    tokens = args.get("max_seq_len", MAX_TOKENS)
    if type(tokens) is not int or tokens < 2:
        raise CheckpointError(
            f"{folder / ARGS} has max_seq_len = {tokens!r}, but it must be an integer of at least 2: correct it."
        )
    data = {
        "max_genes": tokens - 1, "genes": "top", "values": "quantiles", "dropped": [],
        "gene_rows": [vocab[name] for name in names],
        PUBLISHED: {"args": args, "special": special, "renamed": renamed, "attention": spelling},
    }  # fmt: skip
    lacks = [name for field, name in _PARTS.items() if not getattr(config, field)]
    report = [
        f"The model has {len(names):,} genes. {unknown:,} of them are not in the table of human protein-coding genes "
        "and are matched by their published names.",
        *([f"The folder lacks weights of: {', '.join(lacks)}."] if lacks else []),
    ]
    for line in report:
        messages.info(line)
    model = Pretrained(FAMILY, config, unflatten(arrays), genes, data=data)
    origin = f"## Origin\n\nConverted from scGPT weights. {' '.join(report)} {NOTICE}"
    return dataclasses.replace(model, card=default_card(model, origin))


def _read(reader: FolderReader | TorchReader, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """Read one parameter as float32."""

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return entry.take(lambda index: reader.part(name, index), tuple(slice(0, size) for size in shape))

    if not entry.stacked:
        return np.ascontiguousarray(one(entry.names[0], shape), np.float32)
    return np.stack([np.asarray(one(name, shape[1:]), np.float32) for name in entry.names])


def arrays(model: Pretrained) -> dict[str, np.ndarray]:
    """Return the arrays of a model by their published names, float32.

    Raises
    ------
    CheckpointError
        The format does not support a parameter, such as an adapter.
    """
    params = {path: np.asarray(value, np.float32) for path, value in flatten(model.variables).items()}
    spelling = dict(model.data.get(PUBLISHED, {})).get("attention", "Wqkv")
    pieces: dict[str, list[tuple[Entry, np.ndarray]]] = {}
    for path, entry in _entries(model.config, spelling, params).items():
        for layer, name in enumerate(entry.names):
            value = params[path][layer] if entry.stacked else params[path]
            pieces.setdefault(name, []).append((entry, value))
    made = {name: parts[0][0].join([value for _, value in parts]) for name, parts in pieces.items()}
    counted = {
        f"{_DOMAIN.format(number)}.num_batches_tracked": np.asarray(0, np.int64)
        for number in range(model.config.num_batches if model.config.domain_norm else 0)
    }
    return {**made, **counted}


def _args(model: Pretrained) -> dict[str, Any]:
    """Return the content of `args.json`: that of the converted folder, with the options of the model."""
    config: CellEncoderConfig = model.config
    made = dict(dict(model.data.get(PUBLISHED, {})).get("args", {}))
    for theirs, (ours, _) in _OPTIONS.items():
        value = getattr(config, ours)
        if isinstance(value, float) and value.is_integer() and theirs != "dropout":
            value = int(value)
        made[theirs] = value
    made |= {"pre_norm": config.norm == "pre", "pad_token": made.get("pad_token", PAD)}
    if config.mvc:
        made["mvc_decoder_style"] = config.mvc
    if model.data.get("max_genes"):
        made["max_seq_len"] = int(model.data["max_genes"]) + 1
    return made


def _vocab(model: Pretrained) -> dict[str, int]:
    """Return the content of `vocab.json`: the row of every gene and special token."""
    config: CellEncoderConfig = model.config
    published = dict(model.data.get(PUBLISHED, {}))
    renamed = published.get("renamed", {})
    special = published.get("special", {PAD: config.pad_id, CLS: config.cls_id})
    rows = model.data.get("gene_rows", range(len(model.vocabulary)))
    made: dict[str, int] = {}
    for symbol, key, row in zip(model.vocabulary.symbols, model.vocabulary.keys, rows, strict=True):
        name = renamed.get(key, symbol)
        if row >= 0:  # two genes may share a symbol
            made[key if name in made else name] = int(row)
    return dict(sorted({**made, **special}.items(), key=lambda item: item[1]))


def save(model: Pretrained, target: Path, dtype: str = "float32") -> None:
    """Write a model as a folder with `best_model.pt`, `args.json` and `vocab.json`. The write is atomic.

    Raises
    ------
    CheckpointError
        The model belongs to another family, or has parameters that the format does not support.
    MissingExtraError
        torch is not installed.
    """
    if model.family != FAMILY:
        raise CheckpointError(
            f"the model has the architecture {model.family!r}, but the scGPT format holds only {FAMILY!r}: save a "
            "model folder with save_pretrained."
        )
    torch = load_extra("torch", "torch", what=f"writing {TORCH_FILE}")
    state = {name: torch.from_numpy(np.array(value)) for name, value in arrays(model).items()}
    if dtype == "bfloat16":
        state = {
            name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()
        }
    with atomic_folder(target, _is_leftover) as new:
        torch.save(state, new / TORCH_FILE)
        for name, content in ((ARGS, _args(model)), (VOCAB, _vocab(model))):
            (new / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _is_leftover(folder: Path) -> bool:
    return all(file.name in (TORCH_FILE, ARGS, VOCAB) and file.is_file() for file in folder.iterdir())
