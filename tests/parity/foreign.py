"""Small models of `transformers` with weights that make every part of the architecture count."""

from __future__ import annotations

from typing import Any

import numpy as np

LENGTH = 19
REASON = (
    "{0} is not installed: it takes torch and transformers to compare with (pip install torch transformers)"
)

# Options of each `transformers` configuration; sizes that are not said are those of `_SIZES`.
GPT2 = {
    "plain": {"n_head": 3, "n_embd": 24},
    "untied": {"n_head": 1, "n_inner": 50, "activation_function": "gelu", "tie_word_embeddings": False},
    "odd": {"n_head": 4, "n_embd": 20, "vocab_size": 53, "n_layer": 3, "layer_norm_epsilon": 1e-2},
}
NEOX = {
    "plain": {"num_attention_heads": 2},
    "sequential": {
        "num_attention_heads": 4, "use_parallel_residual": False, "hidden_act": "gelu_fast",
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                                                          "partial_rotary_factor": 1.0},
    },
    "no biases": {
        "attention_bias": False, "num_attention_heads": 3, "hidden_size": 36, "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}  # fmt: skip
LLAMA = {
    "plain": {"num_attention_heads": 4},
    "grouped": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "wide heads": {
        "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 10, "attention_bias": True,
        "mlp_bias": True, "vocab_size": 53, "rms_norm_eps": 1e-2,
    },
    "llama3": {
        "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "linear": {"num_attention_heads": 2, "num_key_value_heads": 1,
               "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
}  # fmt: skip
BERT = {
    "plain": {"num_attention_heads": 4},
    "untied": {"num_attention_heads": 2, "tie_word_embeddings": False, "hidden_act": "gelu_new", "vocab_size": 53},
    "odd": {
        "num_attention_heads": 3, "hidden_size": 21, "num_hidden_layers": 3, "type_vocab_size": 3,
        "hidden_act": "relu", "layer_norm_eps": 1e-3,
    },
}  # fmt: skip
CASES = [(kind, name) for kind, all_ in (("gpt2", GPT2), ("neox", NEOX), ("llama", LLAMA)) for name in all_]

_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_positions": 40},
    "neox": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 44,
             "max_position_embeddings": 40},
    "llama": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 44,
              "max_position_embeddings": 40},
    # Without a token of padding, whose embedding torch would not give a gradient.
    "bert": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 44,
             "max_position_embeddings": 40, "pad_token_id": None},
}  # fmt: skip
_CLASSES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "bert": ("BertConfig", "BertForPreTraining"),
}


def options(kind: str, name: str) -> dict[str, Any]:
    """Options of a case."""
    return {**_SIZES[kind], **{"gpt2": GPT2, "neox": NEOX, "llama": LLAMA, "bert": BERT}[kind][name]}


def make(kind: str, name: str = "plain", model: str | None = None, **changes: Any) -> Any:
    """Model of `transformers`, without dropout, with random weights of a fixed seed."""
    import torch
    import transformers

    config = getattr(transformers, _CLASSES[kind][0])(**{**options(kind, name), **changes})
    made = getattr(transformers, model or _CLASSES[kind][1])(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in made.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.3 * noise + (0.0 if key.endswith("bias") else 1.0))
            else:
                value.copy_(
                    noise
                    * (0.7 if "emb" in key or "wte" in key or "wpe" in key else 1.4 * value.shape[1] ** -0.5)
                )
        head = getattr(getattr(made, "cls", None), "predictions", None)
        if head is not None:  # one bias, of which only one of two names is computed with
            head.decoder.bias.copy_(head.bias)
    return made


def inputs(vocab_size: int, rows: int = 3, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Texts: whole, padded on the left, padded on the right; with positions counted from each one's beginning."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, length))
    mask = np.ones((rows, length), np.int64)
    mask[1, :5], mask[2, -6:] = 0, 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "positions": positions}


def outputs(model: Any, given: dict[str, np.ndarray], **more: Any) -> Any:
    """What `transformers` computes for our inputs."""
    import torch

    names = {"positions": "position_ids"}
    return model(**{names.get(k, k): torch.as_tensor(v) for k, v in given.items()}, **more)


def same_weights(one: Any, other: Any) -> None:
    """Assert that two models have the same parameters, bit by bit, and the same ones tied."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name] == second[name]).all(), name
    parameters = [{name for name, _ in model.named_parameters()} for model in (one, other)]
    assert parameters[0] == parameters[1]
