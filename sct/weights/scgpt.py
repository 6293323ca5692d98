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
from sct.data.cell_options import CellOptions
from sct.data.genes.alignment import ENSEMBL, look_up, without_version
from sct.data.genes.vocabulary import GeneVocabulary
from sct.errors import CheckpointError, ConfigError, DataError
from sct.extras import load_extra
from sct.models.cell_encoder import STATISTICS
from sct.models.cell_encoder_config import MVC, CellEncoderConfig
from sct.nn.paths import flatten, unflatten
from sct.weights.hf.files import TorchReader
from sct.weights.hf.folder import NOTICE
from sct.weights.hf.maps import LINEAR, NORM, TABLE, Entry, Leaves, Row, check_all_located, located
from sct.weights.model_folder import INDEX, WEIGHTS, FolderReader, check_finite_array, read_json
from sct.weights.pretrained import Pretrained, default_card, expected_shapes, match

__all__ = ["NOTICE", "convert", "save"]

FAMILY = "scgpt"
ARGS, VOCAB, TORCH_FILE = "args.json", "vocab.json", "best_model.pt"
CLS, PAD = "<cls>", "<pad>"
_SPECIAL = re.compile(r"<[^<>]*>")
PUBLISHED = "published"  # entry of the data section: what an export needs and our own files do not hold
OWN = "sct"  # entry of args.json: our options that the published format does not have
# Value of `input_style` in args.json -> kind of expression values in this project.
_STYLES = {"binned": "quantiles", "log1p": "log1p"}
MAX_TOKENS = 1200  # maximum number of tokens of a cell, CLS included, in the published models
# Spellings of the fused projection of attention.
_FUSED_KEYS = {
    "Wqkv": ("self_attn.Wqkv", {"kernel": ("weight", True), "bias": ("bias", False)}),
    "in_proj": ("self_attn", {"kernel": ("in_proj_weight", True), "bias": ("in_proj_bias", False)}),
}
_LAYER = "transformer_encoder.layers.{}"
_DOMAIN = "dsbn.bns.{}"
_COUNTED = re.compile(r"dsbn\.bns\.\d+\.num_batches_tracked")  # number of training steps, which nothing reads


def _value_head(ours: str, theirs: str) -> tuple[Row, ...]:
    names = ("hidden_0", "hidden_1", "out")
    return tuple((f"{ours}/{name}", f"{theirs}.{2 * at}", LINEAR) for at, name in enumerate(names))


def _label_head(ours: str, theirs: str, layers: int) -> tuple[Row, ...]:
    rows: list[Row] = []
    for at in range(layers - 1):
        rows.append((f"{ours}/hidden_{at}", f"{theirs}._decoder.{3 * at}", LINEAR))
        rows.append((f"{ours}/norm_{at}", f"{theirs}._decoder.{3 * at + 2}", NORM))
    return (*rows, (f"{ours}/out", f"{theirs}.out_layer", LINEAR))


def _rows(config: CellEncoderConfig, spelling: str) -> tuple[Row, ...]:
    """Return the table of modules: path in this project, name in the published files, and parameters."""
    attention, fused = _FUSED_KEYS[spelling]
    inner = config.mvc.startswith("inner product")
    return (
        ("gene", "encoder.embedding", TABLE),
        ("gene_norm", "encoder.enc_norm", NORM),
        ("flag", "flag_encoder", TABLE),
        ("value_in", "value_encoder.linear1", LINEAR),
        ("value_out", "value_encoder.linear2", LINEAR),
        ("bin", "value_encoder.embedding", TABLE),
        ("value_norm", "value_encoder.norm" if config.values == "continuous" else "value_encoder.enc_norm", NORM),
        ("batch", "batch_encoder.embedding", TABLE),
        ("batch_norm", "batch_encoder.enc_norm", NORM),
        ("layers/attention/query+key+value", f"{_LAYER}.{attention}", fused),
        ("layers/attention/out", f"{_LAYER}.self_attn.out_proj", LINEAR),
        ("layers/mlp/up", f"{_LAYER}.linear1", LINEAR),
        ("layers/mlp/down", f"{_LAYER}.linear2", LINEAR),
        ("layers/attention_norm", f"{_LAYER}.norm1", NORM),
        ("layers/mlp_norm", f"{_LAYER}.norm2", NORM),
        *_value_head("value_head", "decoder.fc"),
        *_value_head("zero_head", "decoder.zero_logit"),
        *_label_head("classifier", "cls_decoder", config.classifier_layers),
        ("mvc_head/query", "mvc_decoder.gene2query", LINEAR),
        ("mvc_head/weights", "mvc_decoder.W", LINEAR),
        ("mvc_head/zero_weights", "mvc_decoder.W_zero_logit", LINEAR),
        *(() if inner else (
            ("mvc_head/hidden", "mvc_decoder.fc1", LINEAR),
            ("mvc_head", "mvc_decoder.hidden_activation", {"slope": ("weight", False)}),
            ("mvc_head/out", "mvc_decoder.fc2", LINEAR),
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
    domains = (("domain_norm", _DOMAIN, NORM),)
    found |= located(domains, config.num_batches, shapes)
    running: Leaves = {"mean": ("running_mean", False), "variance": ("running_var", False)}
    found |= located((("domain_norm", _DOMAIN, running),), config.num_batches, shapes, root=STATISTICS)
    check_all_located(shapes, found, "the scGPT format")
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
    values["norm"] = _norm(args, source)
    return values


def _own(args: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return our options in `args.json` that the published format does not have."""
    own = args.get(OWN, {})
    if not isinstance(own, dict):
        raise CheckpointError(f"{source} has {OWN} = {own!r}, but it must hold options by name: correct it.")
    return own


def _norm(args: Mapping[str, Any], source: Path) -> str:
    """Return the place of the layer norms, which two options name."""
    named: dict[str, dict[Any, str]] = {
        "pre_norm": {True: "pre", False: "post"},
        "norm_scheme": {"pre": "pre", "post": "post"},
    }
    found: dict[str, str] = {}
    for option, known in named.items():
        if option not in args:
            continue
        value = args[option]
        # The types are compared as well, because 1 == True.
        place = [known[each] for each in known if type(each) is type(value) and each == value]
        if not place:
            raise CheckpointError(
                f"{source} has {option} = {value!r}, but it must be {' or '.join(map(json.dumps, known))}: use the "
                f"{ARGS} of this model."
            )
        found[option] = place[0]
    if len(set(found.values())) > 1:
        raise CheckpointError(
            f"{source} has pre_norm = {args['pre_norm']!r} and norm_scheme = {args['norm_scheme']!r}, which contradict "
            "each other: correct one of them."
        )
    return next(iter(found.values()), "post")


def _assumed(args: Mapping[str, Any], config: CellEncoderConfig) -> list[str]:
    """List the options that neither `args.json` nor the weights define, with the values that are assumed."""
    told = {"input_emb_style"}
    if config.values == "category":
        told |= {"n_bins", "pad_value", "mask_value"}
    if not config.num_classes:
        told.add("n_layers_cls")
    options = {name: getattr(config, ours) for name, (ours, _) in _OPTIONS.items() if name not in told}
    options |= {"max_seq_len": MAX_TOKENS, "input_style": "binned", "pad_token": PAD}
    if config.mvc.startswith("inner product"):
        options["mvc_decoder_style"] = config.mvc
    found = [f"{name} = {value}" for name, value in options.items() if name not in args]
    return [*found, *([] if {"pre_norm", "norm_scheme"} & set(args) else [f"norm_scheme = {config.norm}"])]


def _data_options(
    args: Mapping[str, Any], config: CellEncoderConfig, row_at: Mapping[int, int], source: Path
) -> dict[str, Any]:
    """Read the data options of a model: which genes it reads, the kind of their values, and its batches.

    `row_at` is the position of the gene with each row.
    """

    def wrong(found: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{source} has {found}, but {wanted}: correct it.")

    tokens = args.get("max_seq_len", MAX_TOKENS)
    if type(tokens) is not int or tokens < 2:
        raise wrong(f"max_seq_len = {tokens!r}", "it must be an integer of at least 2")
    style = args.get("input_style", "binned")
    if not isinstance(style, str) or style not in _STYLES:
        raise wrong(f"input_style = {style!r}", f"this project reads only {' and '.join(_STYLES)}")
    data = {"max_genes": tokens - 1, "genes": "top", "values": _STYLES[style]}
    own = _own(args, source)
    data |= {name: own[name] for name in (*data, "batch_key", "batches") if name in own}
    if type(data["max_genes"]) is not int:
        raise wrong(f"{OWN}.max_genes = {data['max_genes']!r}", "it must be an integer")
    try:
        _ = CellOptions.of_tokens(config.num_bins, config.values == "category", data)
    except ConfigError as error:
        raise CheckpointError(f"{source} has data options that contradict each other: {error}") from None
    if "listed" in own:
        rows = own["listed"]
        if not isinstance(rows, list) or not all(type(row) is int and row in row_at for row in rows):
            raise wrong(f"a list {OWN}.listed", "each entry must be the row of a gene")
        data["listed"] = sorted(row_at[row] for row in rows)
    names = data.get("batches", [])
    if not isinstance(names, list) or ("batches" in data and len(names) != config.num_batches):
        raise wrong(f"{OWN}.batches = {names!r}", f"the weights have {config.num_batches} batch labels")
    return data


def _mvc(shapes: Mapping[str, Any], args: Mapping[str, Any], width: int, source: Path) -> str:
    """Return the form of the MVC head, from the arrays in the files; "" for no head."""
    if "mvc_decoder.gene2query.weight" not in shapes:
        return ""
    if "mvc_decoder.fc1.weight" in shapes:
        found = "concat query" if shapes["mvc_decoder.fc1.weight"].shape[-1] > width else "sum query"
        if args.get("mvc_decoder_style", found) != found:
            raise CheckpointError(
                f"{source} has mvc_decoder_style = {args['mvc_decoder_style']!r}, but the weights are those of "
                f"{found!r}: use the {ARGS} of this model."
            )
        return found
    # Only training tells the two forms with an inner product apart.
    style = args.get("mvc_decoder_style", "inner product")
    if style not in MVC or not style.startswith("inner product"):
        raise CheckpointError(
            f"{source} has mvc_decoder_style = {style!r}, but the weights are those of 'inner product' or 'inner "
            f"product, detach': use the {ARGS} of this model."
        )
    return str(style)


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
    elif args.get("input_emb_style") == "scaling":
        found = {"values": "scaling"}
    else:
        raise CheckpointError(
            f"{folder} has no arrays of a value encoder, and {ARGS} does not have input_emb_style = 'scaling': the "
            "weights are incomplete, so download them again, or add this option if the model multiplies gene "
            "embeddings by values."
        )
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
    if not isinstance(pad, str):
        raise CheckpointError(
            f"{folder / ARGS} has pad_token = {pad!r}, but it must be a name in {VOCAB}: correct it."
        )
    own = _own(args, folder / ARGS)
    maximum = own.get("max_value", CellEncoderConfig.max_value)
    if type(maximum) not in (int, float) or not maximum > 0:
        raise CheckpointError(
            f"{folder / ARGS} has {OWN}.max_value = {maximum!r}, but it must be a number above 0: correct it."
        )
    for token in (pad, CLS):
        if token not in vocab:
            raise CheckpointError(
                f"{folder / VOCAB} has no token {token!r}, but the model needs its row: use the {VOCAB} of this model."
            )
    try:
        return CellEncoderConfig(**{
            **values, **found, "max_value": float(maximum), "vocab_size": table,
            "pad_id": vocab[pad], "cls_id": vocab[CLS],
            "num_classes": rows("cls_decoder.out_layer.weight"), "num_batches": labels or domains or discriminated,
            "use_batch_labels": labels > 0 or not (domains or discriminated), "dab": discriminated > 0,
            "domain_norm": "" if not domains else "affine" if "dsbn.bns.0.weight" in shapes else "plain",
            "mvc": _mvc(shapes, args, int(values["embed_dim"]), folder / ARGS),
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


def _vocabulary(names: list[str]) -> tuple[GeneVocabulary, np.ndarray]:
    """Make the gene vocabulary from published gene names, in the given order.

    A name that means a gene of the shipped human table gets the id and the approved symbol of this gene. If several
    names mean the same gene, the approved symbol counts, then the id, then the first of the other names. The others
    stay genes of their own, as do names that the table does not have. If a file has both the symbol and the id of a
    gene, both keep only the published name, so that each name leads to its own row.

    Returns
    -------
    The vocabulary, and whether each name means one gene of the table, bool (n,); others are unknown or ambiguous.
    """
    human, present = GeneVocabulary.human(), set(names)
    own_ids = [without_version(name) if ENSEMBL.fullmatch(name) else "" for name in names]
    all_ids = set(own_ids)
    found = look_up(human, names)[0]
    positions = found.tolist()
    owner: dict[int, str] = {}
    for name, position in zip(names, positions, strict=True):
        if position >= 0:
            known = [human.symbols[position], human.ensembl_ids[position]]
            owner.setdefault(position, next((each for each in known if each in present), name))
    ids: list[str] = []
    symbols: list[str] = []
    taken: set[str] = set()
    for name, own_id, position in zip(names, own_ids, positions, strict=True):
        symbol, key = name, own_id
        if position >= 0 and owner[position] == name:
            symbol, key = human.symbols[position], human.ensembl_ids[position]
        # Another name has this id.
        if key in taken or (key in all_ids and key != own_id) or (key in present and key != name):
            key = ""
        taken.add(key)
        ids.append(key)
        symbols.append(symbol)
    return GeneVocabulary.from_ids(ids, symbols, name="scgpt-published"), found >= 0


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
    pad = args.get("pad_token", PAD)
    special = {name: row for name, row in vocab.items() if _SPECIAL.fullmatch(name) or name == pad}
    names = [name for name in vocab if name not in special]
    if max(vocab.values()) >= config.vocab_size:
        raise CheckpointError(
            f"{folder / VOCAB} has the row {max(vocab.values())}, but the weights have only {config.vocab_size} rows: "
            f"use the {VOCAB} of this model."
        )
    try:
        genes, listed = _vocabulary(names)
    except DataError as error:
        raise CheckpointError(f"{folder / VOCAB} does not hold the names of genes: {error}") from None
    renamed = {
        key: name
        for key, symbol, name in zip(genes.keys, genes.symbols, names, strict=True)
        if symbol != name
    }
    rows = [vocab[name] for name in names]
    published = {name: value for name, value in args.items() if name != OWN}
    data = {
        **_data_options(args, config, {row: at for at, row in enumerate(rows)}, folder / ARGS), "dropped": [],
        "gene_rows": rows,
        PUBLISHED: {"args": published, "special": special, "renamed": renamed, "attention": spelling},
    }  # fmt: skip
    assumed = _assumed(args, config)
    lacks = [name for field, name in _PARTS.items() if not getattr(config, field)]
    human = set(GeneVocabulary.human().ensembl_ids)
    # A name of a gene whose id belongs to another name.
    second = sum(
        bool(known) and key not in human for known, key in zip(listed, genes.ensembl_ids, strict=True)
    )
    counted = {
        "unknown or ambiguous": int((~listed).sum()),
        "other names of genes that are in the file twice": second,
    }
    kept = " and ".join(f"{number:,} {what}" for what, number in counted.items() if number)
    report = [
        f"The model has {len(names):,} genes. {int(listed.sum()) - second:,} of them are genes of the table of human "
        f"protein-coding genes; {len(renamed):,} of these get another symbol from the table.",
        *([f"The others are matched by their published names alone: {kept}."] if kept else []),
        *([f"The folder lacks weights of: {', '.join(lacks)}."] if lacks else []),
        *([f"{ARGS} lacks these options, so they are assumed: {', '.join(assumed)}."] if assumed else []),
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
    if "norm_scheme" in made:
        made["norm_scheme"] = config.norm
    if config.mvc:
        made["mvc_decoder_style"] = config.mvc
    if model.data.get("max_genes"):
        made["max_seq_len"] = int(model.data["max_genes"]) + 1
    style = {ours: theirs for theirs, ours in _STYLES.items()}.get(model.data.get("values", "quantiles"))
    made["input_style"] = style or "binned"
    own = _own_options(model)
    return {**made, OWN: own} if own else made


def _own_options(model: Pretrained) -> dict[str, Any]:
    """Return the options that the published format does not have: those that differ from what `convert` assumes."""
    data, config = model.data, model.config
    options = CellOptions.of_tokens(config.num_bins, config.values == "category", {"max_genes": 0, **data})
    made: dict[str, Any] = {}
    if config.max_value != CellEncoderConfig.max_value:
        made["max_value"] = config.max_value
    if options.choice != "top":
        made |= {"genes": options.choice, "max_genes": options.max_genes}
    if options.values not in _STYLES.values():
        made["values"] = options.values
    if data.get("listed") is not None:  # by row, because the order of the genes is not kept
        rows = data.get("gene_rows", range(len(model.vocabulary)))
        made["listed"] = [int(rows[at]) for at in data["listed"]]
    return made | {name: data[name] for name in ("batch_key", "batches") if name in data}


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
        The model belongs to another family, has parameters that the format does not support, or has NaN or infinite
        weights.
    MissingExtraError
        torch is not installed.
    """
    if model.family != FAMILY:
        raise CheckpointError(
            f"the model has the architecture {model.family!r}, but the scGPT format holds only {FAMILY!r}: save a "
            "model folder with save_pretrained."
        )
    torch = load_extra("torch", "torch", what=f"writing {TORCH_FILE}")
    written = arrays(model)
    for name, value in written.items():
        check_finite_array(value, name, target)
    state = {name: torch.from_numpy(np.array(value)) for name, value in written.items()}
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
