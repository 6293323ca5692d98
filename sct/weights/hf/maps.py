"""Map the parameters of text models to the arrays in Hugging Face files, by one ordered table per family.

There are three differences between this project and Hugging Face:

- The parameters of all layers are stacked here, (layers, ...). In Hugging Face files each layer has its own arrays.
- Query, key and value are three projections here. In GPT-2 and GPT-NeoX files they are one fused projection.
- Kernels have the shape (in, out) here. In the dense layers of PyTorch, kernels have the shape (out, in).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sct.errors import CheckpointError

# Our parameter name -> Hugging Face's name, and whether the two axes are swapped.
Leaves = Mapping[str, tuple[str, bool]]
TABLE: Leaves = {"embedding": ("weight", False)}
NORM: Leaves = {"scale": ("weight", False), "bias": ("bias", False)}
_CONV: Leaves = {"kernel": ("weight", False), "bias": ("bias", False)}
LINEAR: Leaves = {"kernel": ("weight", True), "bias": ("bias", False)}
_BIAS: Leaves = {"head_bias": ("bias", False)}
_FUSED = re.compile(r"[^/]*\+[^/]*")
Row = tuple[str, str, Leaves]

# Our module, Hugging Face's module (`{}` is the layer number), and its parameters.
_GPT2: tuple[Row, ...] = (
    ("token", "transformer.wte", TABLE),
    ("position", "transformer.wpe", TABLE),
    ("layers/attention_norm", "transformer.h.{}.ln_1", NORM),
    ("layers/attention/query+key+value", "transformer.h.{}.attn.c_attn", _CONV),
    ("layers/attention/out", "transformer.h.{}.attn.c_proj", _CONV),
    ("layers/mlp_norm", "transformer.h.{}.ln_2", NORM),
    ("layers/mlp/up", "transformer.h.{}.mlp.c_fc", _CONV),
    ("layers/mlp/down", "transformer.h.{}.mlp.c_proj", _CONV),
    ("norm", "transformer.ln_f", NORM),
    ("head", "lm_head", LINEAR),
)
_NEOX: tuple[Row, ...] = (
    ("token", "gpt_neox.embed_in", TABLE),
    ("layers/attention_norm", "gpt_neox.layers.{}.input_layernorm", NORM),
    ("layers/attention/query+key+value", "gpt_neox.layers.{}.attention.query_key_value", LINEAR),
    ("layers/attention/out", "gpt_neox.layers.{}.attention.dense", LINEAR),
    ("layers/mlp_norm", "gpt_neox.layers.{}.post_attention_layernorm", NORM),
    ("layers/mlp/up", "gpt_neox.layers.{}.mlp.dense_h_to_4h", LINEAR),
    ("layers/mlp/down", "gpt_neox.layers.{}.mlp.dense_4h_to_h", LINEAR),
    ("norm", "gpt_neox.final_layer_norm", NORM),
    ("head", "embed_out", LINEAR),
)
_LLAMA: tuple[Row, ...] = (
    ("token", "model.embed_tokens", TABLE),
    ("layers/attention_norm", "model.layers.{}.input_layernorm", NORM),
    ("layers/attention/query", "model.layers.{}.self_attn.q_proj", LINEAR),
    ("layers/attention/key", "model.layers.{}.self_attn.k_proj", LINEAR),
    ("layers/attention/value", "model.layers.{}.self_attn.v_proj", LINEAR),
    ("layers/attention/out", "model.layers.{}.self_attn.o_proj", LINEAR),
    ("layers/mlp_norm", "model.layers.{}.post_attention_layernorm", NORM),
    ("layers/mlp/gate", "model.layers.{}.mlp.gate_proj", LINEAR),
    ("layers/mlp/up", "model.layers.{}.mlp.up_proj", LINEAR),
    ("layers/mlp/down", "model.layers.{}.mlp.down_proj", LINEAR),
    ("norm", "model.norm", NORM),
    ("head", "lm_head", LINEAR),
)
_BERT: tuple[Row, ...] = (
    ("token", "bert.embeddings.word_embeddings", TABLE),
    ("position", "bert.embeddings.position_embeddings", TABLE),
    ("type", "bert.embeddings.token_type_embeddings", TABLE),
    ("norm", "bert.embeddings.LayerNorm", NORM),
    ("layers/attention/query", "bert.encoder.layer.{}.attention.self.query", LINEAR),
    ("layers/attention/key", "bert.encoder.layer.{}.attention.self.key", LINEAR),
    ("layers/attention/value", "bert.encoder.layer.{}.attention.self.value", LINEAR),
    ("layers/attention/out", "bert.encoder.layer.{}.attention.output.dense", LINEAR),
    ("layers/attention_norm", "bert.encoder.layer.{}.attention.output.LayerNorm", NORM),
    ("layers/mlp/up", "bert.encoder.layer.{}.intermediate.dense", LINEAR),
    ("layers/mlp/down", "bert.encoder.layer.{}.output.dense", LINEAR),
    ("layers/mlp_norm", "bert.encoder.layer.{}.output.LayerNorm", NORM),
    ("pooler", "bert.pooler.dense", LINEAR),
    ("transform", "cls.predictions.transform.dense", LINEAR),
    ("transform_norm", "cls.predictions.transform.LayerNorm", NORM),
    ("head", "cls.predictions.decoder", LINEAR),
    ("", "cls.predictions", _BIAS),
)


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Names of the arrays in the Hugging Face files of a model family.

    Attributes
    ----------
    prefix
        Prefix of all array names except the name of the output head. In the files of a model that was saved without its
        head, array names have no prefix.
    rows
        Rows of the table. A row holds the path of a module in this project, the Hugging Face name of the module, and
        the names of its parameters.
    head
        Name of the matrix of the output head.
    head_names
        All names that releases of `transformers` use for the matrix of the output head.
    ignored
        Regular expression of the names of arrays to ignore. These arrays are not learned (masks, frequencies,
        positions) or belong to another task.
    """

    prefix: str
    rows: tuple[Row, ...]
    head: str
    head_names: tuple[str, ...]
    ignored: str

    @property
    def table(self) -> str:
        """Return the name of the token embedding matrix. A tied output head uses the same matrix."""
        return f"{self.rows[0][1]}.weight"


FAMILIES: dict[str, NameMap] = {
    "gpt2": NameMap(
        "transformer.", _GPT2, "lm_head.weight", ("lm_head.weight",),
        r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "neox": NameMap(
        "gpt_neox.", _NEOX, "embed_out.weight", ("embed_out.weight", "lm_head.weight"),
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|gpt_neox\.rotary_emb\.inv_freq",
    ),
    "llama": NameMap(
        "model.", _LLAMA, "lm_head.weight", ("lm_head.weight",),
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    ),
    "bert": NameMap(
        "bert.", _BERT, "cls.predictions.decoder.weight", ("cls.predictions.decoder.weight",),
        # `seq_relationship` is the head for next-sentence prediction, which is not used here.
        r"bert\.embeddings\.(position_ids|token_type_ids)|cls\.seq_relationship\.(weight|bias)",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """Location of a parameter in Hugging Face files. A parameter may be one of several equal parts of a fused array.

    Attributes
    ----------
    names
        Names of the arrays: one per layer if `stacked`, otherwise one.
    stacked
        Whether the parameter is stacked over layers.
    transposed
        Whether the arrays have the shape (out, in).
    piece, pieces, run
        For a fused array: the index of this part (`piece`), the number of parts (`pieces`), and the block size (`run`).
        The parts alternate along the output axis in blocks of `run` features: a block of part 0, a block of part 1, and
        so on, then the next block of part 0.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    piece: int
    pieces: int
    run: int

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each array in the files, given the shape of the parameter."""
        one = ours[1:] if self.stacked else ours
        one = (*one[:-1], one[-1] * self.pieces)
        return one[::-1] if self.transposed else one

    def take(self, part: Callable[[tuple[slice, ...]], np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of a parameter, for one layer.

        Parameters
        ----------
        part
            Function that takes an index and returns the slice of the layer's array at this index.
        index
            Slice of the parameter, without the layer axis.
        """
        if self.pieces == 1:
            found = part(index[::-1] if self.transposed else index)
            return found.T if self.transposed else found
        *before, out = index
        blocks = []
        for number in range(out.start // self.run, -(-out.stop // self.run)):
            begin = (number * self.pieces + self.piece - number) * self.run
            columns = slice(
                begin + max(out.start, number * self.run), begin + min(out.stop, (number + 1) * self.run)
            )
            whole = (*before, columns)
            block = part(whole[::-1] if self.transposed else whole)
            blocks.append(block.T if self.transposed else block)
        return np.concatenate(blocks, axis=-1)

    def join(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Fuse parameters, such as query, key and value, into one array of a layer. This is the inverse of `take`."""
        made = pieces[0]
        if self.pieces > 1:
            runs = [x.reshape(*x.shape[:-1], -1, self.run) for x in pieces]
            made = np.stack(runs, axis=-2).reshape(*made.shape[:-1], -1)
        return np.ascontiguousarray(made.T if self.transposed else made)


def entries(family: str, config: Any, shapes: Mapping[str, Any]) -> dict[str, Entry]:
    """Return a dict from the path of each parameter to its location in Hugging Face files, in the order of the table.

    Raises
    ------
    CheckpointError
        A parameter is not in the table.
    """
    # GPT-NeoX interleaves query, key and value per head. GPT-2 stores all heads of query, then key, value.
    run = config.head_size if family == "neox" else 0
    found = located(FAMILIES[family].rows, config.num_layers, shapes, run)
    check_all_located(shapes, found, f"the Hugging Face format of {family}")
    return found


def located(
    rows: Iterable[Row], num_layers: int, shapes: Mapping[str, Any], run: int = 0, root: str = "params"
) -> dict[str, Entry]:
    """Return a dict from the path of each parameter in a table to its location in the files, in the order of the table.

    Parameters
    ----------
    rows
        Rows of the table; see `NameMap`.
    num_layers
        Number of layers of the stacks.
    shapes
        Shapes of the parameters by path. Parameters that are not in the table, or not in `shapes`, are left out.
    run
        Block size of fused arrays; see `Entry`. With 0, a block holds all features of a part.
    root
        Collection of the parameters.
    """
    found: dict[str, Entry] = {}
    for ours, theirs, leaves in rows:
        fused = _FUSED.search(ours)
        parts = fused[0].split("+") if fused else [""]
        for piece, part in enumerate(parts):
            module = _FUSED.sub(part, ours)
            for leaf, (foreign, transposed) in leaves.items():
                path = "/".join(name for name in (root, module, leaf) if name)
                if path not in shapes:
                    continue
                stacked = "{}" in theirs
                names = [theirs.format(layer) for layer in range(num_layers if stacked else 1)]
                width = shapes[path].shape[-1]
                size = run if fused and run else width
                found[path] = Entry(
                    tuple(f"{name}.{foreign}" for name in names), stacked, transposed, piece, len(parts), size
                )
    return found


def check_all_located(shapes: Mapping[str, Any], found: Mapping[str, Entry], what: str) -> None:
    """Raise `CheckpointError` if a parameter has no location in a format, which `what` names."""
    unknown = sorted(set(shapes) - set(found))
    if unknown:
        raise CheckpointError(
            f"{what} does not support the parameter {unknown[0]}: if this is an adapter, merge it into the model first "
            "(sct.models.lora.merge); otherwise save a model folder with save_pretrained."
        )


def resolve(family: str, keys: list[str], expected: set[str], source: str) -> dict[str, str]:
    """Match the array names of the table to the keys in the files. Return a dict from array name to key.

    A key may lack the family's prefix or use an older spelling. A key that matches no array name of the table is used
    as an array name itself.

    Parameters
    ----------
    keys
        Keys in the files.
    expected
        Array names of the table.
    source
        Name of the folder for the error message.

    Raises
    ------
    CheckpointError
        Two keys in the files belong to the same array name.
    """
    prefix = FAMILIES[family].prefix
    names: dict[str, str] = {}
    known = re.compile(FAMILIES[family].ignored)
    extra = {*FAMILIES[family].head_names, "cls.predictions.bias", "cls.predictions.decoder.bias"}
    for key in keys:
        # Early BERT files use TensorFlow's names for the parameters of layer norms.
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key) if family == "bert" else key
        plain = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain) if family == "bert" else plain
        fits = [n for n in (plain, prefix + plain) if n in expected or n in extra or known.fullmatch(n)]
        name = fits[0] if fits else key
        if name in names:
            raise CheckpointError(
                f"{source} has the array {name} twice, under the names {names[name]} and {key}: delete one of the two."
            )
        names[name] = key
    return names


def copies(family: str, tied: bool) -> list[tuple[str, str, bool]]:
    """Return the arrays that Hugging Face files may hold twice.

    Each entry is (name of the copy, name of the original, whether both must be equal).
    """
    table = FAMILIES[family]
    original = table.table if tied else table.head
    found = [(name, original, True) for name in table.head_names if name != original]
    if family == "bert":
        bias, other = "cls.predictions.bias", "cls.predictions.decoder.bias"
        # With an untied head, `transformers` 5 uses `cls.predictions.decoder.bias`.
        found.append((other, bias, True) if tied else (bias, other, False))
    return found
