"""Measure the mode `embed`: time `sct.tl.embed` on cells in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anndata as ad
import jax
import numpy as np
import pandas as pd

from sct.data.bag_order import random_order
from sct.data.store import Store
from sct.data.tokenize import bin_counts
from sct.nn.paths import unflatten
from sct.speed import compute, reference
from sct.speed.compare import Check, Outputs, compare
from sct.speed.job import SpeedJob
from sct.speed.timing import timed
from sct.tl.embedding import embed
from sct.train import sharding
from sct.weights.pretrained import Pretrained


def _pretrained(job: SpeedJob, task: Any, variables: Any) -> Pretrained:
    """Return a model with the given variables.

    The model has the data option noise_fraction=0, which keeps all genes, even if there are few cells.
    """
    data = {"cells_per_bag": task.bags.cells_per_bag, "noise_fraction": 0.0}
    return Pretrained(job.config["family"], task.model_config, variables, task.vocabulary, data=data)


def _table(store: Store, cells: int) -> ad.AnnData:
    """Return the first cells of the first training study, as an AnnData in memory."""
    study = store.split("train")[0]
    var = pd.DataFrame(index=pd.Index(np.array(store.vocabulary.keys, dtype=object), dtype=object))
    counts = study.read(0, min(cells, study.n_cells))
    obs = pd.DataFrame(index=pd.Index([f"cell{i}" for i in range(counts.shape[0])], dtype=object))
    return ad.AnnData(X=counts, obs=obs, var=var)


def _embedding(adata: ad.AnnData, model: Pretrained) -> np.ndarray:
    embed(adata, model, key_added="X_speed")
    return np.asarray(adata.obsm["X_speed"])


def check_embed(job: SpeedJob, store: Store) -> Check:
    """Compare `sct.tl.embed` with the reference implementation on the same bag; see `sct.speed.compare.compare`."""
    cells = reference.checked_cells(job)
    adata = _table(store, cells)
    order = random_order(np.arange(adata.n_obs), cells)
    counts = store.split("train")[0].read(0, adata.n_obs)[order.rows]
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    known: dict[str, Any] = {}

    def fast(model: Mapping[str, Any]) -> Outputs:
        task = job.task(store, data={"cells_per_bag": cells}, model=model)
        known["arrays"] = reference.moved_state(task, mesh, job.train.seed)[2]
        made = _embedding(adata, _pretrained(job, task, unflatten(known["arrays"])))
        return {"embedding": made[order.rows]}

    def plain(model: Mapping[str, Any]) -> Outputs:
        task = job.task(store, data={"cells_per_bag": cells}, model=model)
        config = task.model_config
        bins = bin_counts(counts, num_bins=config.num_bins, num_positions=config.num_genes)
        given = {"tokens": bins.tokens[None]}
        known["shape"] = reference.shape(given)
        return {"embedding": reference.plain_output(task, known["arrays"], given, "cell_embedding")[0]}

    dtype = job.task(store).model_config.dtype
    return {**compare("sct.tl.embed", dtype, fast, plain, reference.share_of(job, cells)), **known["shape"]}


def measure_embed(job: SpeedJob, store: Store) -> dict[str, Any]:
    """Time `sct.tl.embed`, from counts in memory to the embedding in obsm.

    The report has no operation count. The families count the operations of a whole forward pass, but an embedding needs
    only half of a forward pass.
    """
    task = job.task(store)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    _, _, variables = reference.moved_state(task, mesh, job.train.seed)
    model = _pretrained(job, task, unflatten(variables))
    adata = _table(store, job.cells)

    def call(_: None) -> None:
        _embedding(adata, model)

    first = timed(lambda: None, call, 1, "first call", active=False)
    dtype, devices = task.model_config.dtype, jax.local_devices()
    found = compute.run_steps(job, lambda: None, call, "calls", dtype=dtype, devices=devices, active=False)
    seconds = found["step_seconds"]
    return {
        **found,
        "first_call_seconds": first.median,
        "cells": adata.n_obs,
        "cells_per_bag": task.bags.cells_per_bag,
        "cells_per_s": adata.n_obs / seconds,
        "tokens_per_s": adata.n_obs * task.model_config.num_genes / seconds,
    }
