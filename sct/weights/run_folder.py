"""Models straight from a run folder whose training has not ended: the best checkpoint, or the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sct.data.genes import GeneVocabulary
from sct.errors import CheckpointError
from sct.models import registry
from sct.nn.paths import unflatten


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, ascending."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*") if p.name.isdigit())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run with a checkpoint."""
    return (folder / "config.json").is_file() and bool(steps(folder))


def load(folder: Path, *, mesh: Any, rules: Any, dtype: str | None, genes: GeneVocabulary | None) -> Any:
    """Load the best checkpoint of a run folder as `sct.load` does a model folder."""
    import flax.linen as nn
    import orbax.checkpoint as ocp

    from sct.nn import axes
    from sct.nn.paths import flatten
    from sct.weights import pretrained

    config = json.loads((folder / "config.json").read_text())
    vocabulary = GeneVocabulary.load(folder / "genes.tsv")
    if genes is not None:
        vocabulary.check_same(genes, what=f"the run {folder}", other_what="the data")
    there = steps(folder)
    last = json.loads(_progress(folder, there[-1]).read_text())
    best = last.get("best_step")
    step = best if best in there else there[-1]
    model = registry.model_config(config["family"], config["model"], len(vocabulary))
    boxed = pretrained.boxed_shapes(config["family"], model)
    expected = flatten(nn.unbox(boxed))
    handler = ocp.PyTreeCheckpointer()
    path = (folder / "checkpoints" / str(step) / "state").absolute()
    state = handler.restore(path, restore_args=_to_numpy(handler.metadata(path)))
    arrays = {**state["frozen"], **state["trained"]}
    pretrained.match(arrays, expected, str(path))
    where = flatten(axes.shardings(boxed, mesh, rules or {})) if mesh is not None else {}
    placed = {
        name: jax.device_put(arrays[name].astype(dtype or arrays[name].dtype), where.get(name))
        for name in expected
    }
    return pretrained.Pretrained(config["family"], model, unflatten(placed), vocabulary)


def _progress(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / str(step) / "progress" / "metadata"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is damaged, delete its folder.")
    return path


def _to_numpy(metadata: Any) -> Any:
    """Restore arguments that bring every array to the host, whatever mesh wrote it."""
    import orbax.checkpoint as ocp

    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree)
