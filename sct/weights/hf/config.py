"""Convert architectures between `config.json` of Hugging Face and the configurations of this project.

An option that changes the output of the model is either converted or refused. Rotary options are read in both
spellings: `rope_theta` with `rope_scaling`, and `rope_parameters` (since `transformers` 5). Rotary options are written
in the older spelling, which all releases of `transformers` read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sct.errors import CheckpointError, ConfigError
from sct.models.bert_config import BertConfig
from sct.models.decoder_config import GPT2Config, LlamaConfig, NeoXConfig

# model_type -> family
FAMILIES = {"gpt2": "gpt2", "gpt_neox": "neox", "llama": "llama", "bert": "bert"}
# Options that do not change the output at inference.
_FREE = ("dropout", "init", "remat", "dtype")
# Hugging Face's name of an activation -> ours. Several names mean the same function.
_GELU = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
}  # fmt: skip
_SILU = {"silu": "swiglu", "swish": "swiglu"}
_SPELLED = {"gelu": "gelu", "gelu_tanh": "gelu_new", "swiglu": "silu", "relu": "relu"}
_ROPE = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip
_MISSING: Any = object()


class _Options:
    """Look up the options of a `config.json` by name, and check their types."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values, self.source = values, source

    def refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.source} has {name} = {value!r}, but {expected}.")

    def __call__(self, name: str, kind: type, default: Any = _MISSING, also: str = "") -> Any:
        value = self.values.get(name)
        if value is None and also:
            value = self.values.get(also)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(
                    f"{self.source} has no option {name!r}, but this architecture requires this option: add it to the "
                    "file."
                )
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.refuse(name, value, f"it must be of type {kind.__name__}: correct it")
        return value

    def only(self, name: str, default: Any, expected: Any = _MISSING) -> None:
        """Raise `CheckpointError` unless an option has the only supported value."""
        expected = default if expected is _MISSING else expected
        value = self.values.get(name, default)
        if (default if value is None else value) != expected:
            self.refuse(name, value, f"only {expected!r} is supported: use a model with this setting")

    def choice(self, name: str, default: str, known: Mapping[str, str]) -> str:
        """Look up an activation function in a table; raise `CheckpointError` if the table does not contain it."""
        value = self.values.get(name) or default
        if value not in known:
            supported = ", ".join(sorted(known))
            self.refuse(
                name, value, f"the supported activations are {supported}: use a model with one of them"
            )
        return known[value]


def _gpt2(get: _Options) -> GPT2Config:
    get.only("scale_attn_weights", True)
    get.only("scale_attn_by_inverse_layer_idx", False)
    get.only("add_cross_attention", False)
    width = get("n_embd", int, also="hidden_size")
    return GPT2Config(
        vocab_size=get("vocab_size", int),
        embed_dim=width,
        num_layers=get("n_layer", int, also="num_hidden_layers"),
        num_heads=get("n_head", int, also="num_attention_heads"),
        ffn_dim=get("n_inner", int, 4 * width),
        max_length=get("n_positions", int, also="max_position_embeddings"),
        norm_eps=get("layer_norm_epsilon", float, 1e-5),
        mlp=get.choice("activation_function", "gelu_new", _GELU),
        tied=get("tie_word_embeddings", bool, True),
        dropout=get("resid_pdrop", float, 0.1),
    )


def _neox(get: _Options) -> NeoXConfig:
    bias = get("attention_bias", bool, True)
    return NeoXConfig(
        vocab_size=get("vocab_size", int),
        embed_dim=get("hidden_size", int),
        num_layers=get("num_hidden_layers", int),
        num_heads=get("num_attention_heads", int),
        ffn_dim=get("intermediate_size", int),
        max_length=get("max_position_embeddings", int, 2048),
        norm_eps=get("layer_norm_eps", float, 1e-5),
        mlp=get.choice("hidden_act", "gelu", _GELU),
        attention_bias=bias,
        out_bias=bias,
        parallel=get("use_parallel_residual", bool, True),
        tied=get("tie_word_embeddings", bool, False),
        dropout=get("hidden_dropout", float, 0.0),
        **_rope(get, "rotary_emb_base", "rotary_pct", 0.25),
    )


def _llama(get: _Options) -> LlamaConfig:
    width, heads = get("hidden_size", int), get("num_attention_heads", int)
    kv_heads, size = get("num_key_value_heads", int, heads), get("head_dim", int, 0)
    bias = get("attention_bias", bool, False)
    get.choice("hidden_act", "silu", _SILU)
    rope = _rope(get, "rope_theta", "partial_rotary_factor", 1.0)
    if rope["rotary_fraction"] != 1.0:
        get.refuse(
            "partial_rotary_factor",
            rope["rotary_fraction"],
            "only 1.0 is supported for LLaMA, which rotates all features of a head: use a model with this setting",
        )
    return LlamaConfig(
        vocab_size=get("vocab_size", int),
        embed_dim=width,
        num_layers=get("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=0 if kv_heads == heads else kv_heads,
        head_dim=0 if size * heads == width else size,
        ffn_dim=get("intermediate_size", int),
        max_length=get("max_position_embeddings", int, 2048),
        norm_eps=get("rms_norm_eps", float, 1e-6),
        attention_bias=bias,
        out_bias=bias,
        mlp_bias=get("mlp_bias", bool, False),
        tied=get("tie_word_embeddings", bool, False),
        **rope,
    )


def _rope(get: _Options, theta: str, fraction: str, part: float) -> dict[str, Any]:
    """Read the options of rotary position embedding from a `config.json`.

    Parameters
    ----------
    theta, fraction
        Names of two options in the older spelling: the base of the frequencies, and the fraction of a head's features
        that is rotated.
    part
        Fraction of a head's features that is rotated. Used if `config.json` does not give this fraction.
    """
    values = get.values.get("rope_scaling") or get.values.get("rope_parameters") or {}
    if not isinstance(values, Mapping):
        get.refuse("rope_parameters", values, "it must be a JSON object: correct it")
    rope = _Options(values, f"rope_parameters in {get.source}")
    kind = rope("rope_type", str, "default", also="type")
    if kind not in ("default", "linear", "llama3"):
        rope.refuse(
            "rope_type", kind, "only default, linear and llama3 are supported: use a model with one of them"
        )
    unknown = sorted(set(values) - _ROPE)
    if unknown:
        rope.refuse(
            unknown[0], values[unknown[0]], "this rotary option is not supported: use a model without it"
        )
    made = {
        "rotary_base": rope("rope_theta", float, get(theta, float, get("rope_theta", float, 10_000.0))),
        "rotary_fraction": rope("partial_rotary_factor", float, get(fraction, float, part)),
    }
    if kind != "default":
        made |= {"rotary_scaling": kind, "rotary_factor": rope("factor", float)}
    if kind == "llama3":
        made |= {
            "rotary_low": rope("low_freq_factor", float),
            "rotary_high": rope("high_freq_factor", float),
            "rotary_length": rope("original_max_position_embeddings", int),
        }
    return made


def _bert(get: _Options) -> BertConfig:
    get.only("position_embedding_type", "absolute")
    get.only("is_decoder", False)
    get.only("add_cross_attention", False)
    return BertConfig(
        vocab_size=get("vocab_size", int),
        embed_dim=get("hidden_size", int),
        num_layers=get("num_hidden_layers", int),
        num_heads=get("num_attention_heads", int),
        ffn_dim=get("intermediate_size", int),
        max_length=get("max_position_embeddings", int, 512),
        num_types=get("type_vocab_size", int, 2),
        norm_eps=get("layer_norm_eps", float, 1e-12),
        activation=get.choice("hidden_act", "gelu", {**_GELU, "relu": "relu"}),
        tied=get("tie_word_embeddings", bool, True),
        dropout=get("hidden_dropout_prob", float, 0.1),
    )


_READ: dict[str, Callable[[_Options], Any]] = {
    "gpt2": _gpt2, "neox": _neox, "llama": _llama, "bert": _bert
}  # fmt: skip


def read(foreign: Mapping[str, Any], source: str) -> tuple[str, Any]:
    """Return the model family and the configuration that a `config.json` describes.

    BERT's `config.json` does not say whether the model has an MLM head and a pooler. The returned configuration has
    both. The caller removes each of the two that has no weights.

    Raises
    ------
    CheckpointError
        The model type is not supported, or an option is missing, of the wrong type, or not supported.
    """
    kind = foreign.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{source} has model_type = {kind!r}, but the supported Hugging Face model types are "
            f"{', '.join(FAMILIES)}: use a model of one of these types."
        )
    get = _Options(foreign, source)
    for name in ("quantization_config", "auto_map", "pruned_heads"):
        if foreign.get(name):
            get.refuse(
                name,
                foreign[name],
                "only unmodified architectures are supported: use a model without this option",
            )
    try:
        return FAMILIES[kind], _READ[FAMILIES[kind]](get)
    except ConfigError as error:
        raise CheckpointError(f"{source} has options that do not fit together: {error}") from None


def write(family: str, config: Any, dtype: str) -> dict[str, Any]:
    """Return the content of a Hugging Face `config.json` for a model.

    Raises
    ------
    ConfigError
        The family has no Hugging Face format, or the format does not support an option. The message names the option.
    """
    if family not in _WRITE:
        raise ConfigError(
            f"the family {family!r} has no Hugging Face format: use a model of one of the families "
            f"{', '.join(_WRITE)}, or save a model folder with save_pretrained."
        )
    made = {**_WRITE[family](config), "tie_word_embeddings": config.tied, "torch_dtype": dtype}
    try:
        back = read(made, "the configuration")[1]
    except CheckpointError as error:
        raise ConfigError(
            f"the Hugging Face format of {family} does not support this model: {error}"
        ) from None
    if family == "bert":
        back = dataclasses.replace(back, pooler=config.pooler, mlm_head=config.mlm_head)
    back = dataclasses.replace(
        back, **{name: getattr(config, name) for name in _FREE if hasattr(config, name)}
    )
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(back, field.name)
        if ours != theirs and not _same(config, back, field.name):
            raise ConfigError(
                f"{field.name} is {ours!r}, but the Hugging Face format of {made['model_type']} supports only "
                f"{theirs!r}: save a model folder with save_pretrained instead."
            )
    return made


def _same(config: Any, back: Any, name: str) -> bool:
    """Return whether two configurations with different values of an option describe the same computation."""
    if name in ("num_kv_heads", "head_dim"):
        return bool(config.kv_heads == back.kv_heads and config.head_size == back.head_size)
    if name.startswith("rotary_"):
        scaling = config.rotary_scaling
        unused = {"": ("factor", "low", "high", "length"), "linear": ("low", "high", "length")}
        return config.positions != "rotary" or name.removeprefix("rotary_") in unused.get(scaling, ())
    return False


def _decoder(config: Any) -> dict[str, Any]:
    """Return the options that the configurations of GPT-NeoX and LLaMA have in common."""
    scaling: dict[str, Any] | None = None
    if config.rotary_scaling:
        # `transformers` before 4.45 reads "type", later releases read "rope_type".
        names = {"type": config.rotary_scaling, "rope_type": config.rotary_scaling}
        scaling = {**names, "factor": config.rotary_factor}
    if scaling is not None and config.rotary_scaling == "llama3":
        scaling |= {"low_freq_factor": config.rotary_low, "high_freq_factor": config.rotary_high}
        scaling["original_max_position_embeddings"] = config.rotary_length
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_length,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling,
    }


def _write_gpt2(config: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_dim,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _SPELLED[config.mlp],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _write_neox(config: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        **_decoder(config),
        "layer_norm_eps": config.norm_eps,
        "hidden_act": _SPELLED[config.mlp],
        "use_parallel_residual": config.parallel,
        "rotary_emb_base": config.rotary_base,
        "rotary_pct": config.rotary_fraction,
        "hidden_dropout": config.dropout,
    }


def _write_llama(config: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_decoder(config),
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "mlp_bias": config.mlp_bias,
        "partial_rotary_factor": config.rotary_fraction,
    }


def _write_bert(config: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM" if config.mlm_head else "BertModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.num_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": _SPELLED[config.activation],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
    }


_WRITE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gpt2": _write_gpt2, "neox": _write_neox, "llama": _write_llama, "bert": _write_bert
}  # fmt: skip
