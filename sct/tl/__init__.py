"""Analyze cells with the conventions of scanpy: each function writes its results into the input AnnData."""

from __future__ import annotations

import importlib
from typing import Any

_FUNCTIONS = {
    "embed": "sct.tl.embedding",
    "fit_readout": "sct.tl.readout",
    "record_benchmark": "sct.tl.readout",
    "in_training_set": "sct.tl.training_set",
    "impute": "sct.tl.imputation",
    "annotate": "sct.tl.annotation",
    "benchmark": "sct.benchmarks.zero_shot",
    "finetune": "sct.train.finetuning",
    "gene_embeddings": "sct.tl.gene_embedding",
    "perturb": "sct.tl.perturbation",
    "spatial_neighbors": "sct.tl.neighbors",
    "to_sentences": "sct.tl.sentences",
    "generate_cells": "sct.tl.sentences",
    "describe": "sct.tl.sentences",
    "find_rare": "sct.tl.asking",
    "find_tumor": "sct.tl.asking",
    "infer_pathways": "sct.tl.asking",
    "ask": "sct.tl.asking",
}

__all__ = [
    "annotate", "ask", "benchmark", "describe", "embed", "find_rare", "find_tumor", "finetune", "fit_readout",
    "gene_embeddings", "generate_cells", "impute", "in_training_set", "infer_pathways", "perturb", "record_benchmark",
    "spatial_neighbors", "to_sentences",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'sct.tl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
