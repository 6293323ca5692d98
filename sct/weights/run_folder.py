"""Models straight from a run folder whose training has not ended: the best checkpoint, or the last one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sct.data.genes import GeneVocabulary
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError
from sct.models import lora, registry
from sct.nn import axes
from sct.nn.paths import flatten, unflatten
from sct.weights import model_folder, pretrained

# Tokenizer of a run on texts; section of the run's config.json with the whole architecture.
TOKENIZER, MODEL = "tokenizer", "resolved_model"


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, ascending."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*") if p.name.isdigit())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run with a checkpoint."""
    return (folder / "config.json").is_file() and bool(steps(folder))


def best_step(folder: Path) -> int:
    """Step of the best checkpoint as the newest one tells it, that of the newest where nothing was validated.

    Raises
    ------
    CheckpointError
        The newest checkpoint is damaged.
    """
    last = steps(folder)[-1]
    path = folder / "checkpoints" / str(last) / "progress" / "metadata"
    progress = model_folder.read_json(path)
    best = progress.get("best_step")
    if not isinstance(best, (int, type(None))):
        raise CheckpointError(
            f"{path} has best_step = {best!r}: the checkpoint is damaged, delete its folder."
        )
    return last if best is None else best


def is_current(folder: Path, exported: Path) -> bool:
    """Whether the exported model of a run is that of its best step, and not one from before it went on."""
    return model_folder.read_config(exported).get("step") == best_step(folder)


def with_masking(data: Any, config: Mapping[str, Any]) -> Any:
    """Data section of a model, with the masking of its run's configuration where it has no record of its own."""
    objective = config.get("objective")
    recorded = objective.get("masking") if isinstance(objective, Mapping) else None
    if not isinstance(data, Mapping) or "masking" in data or not isinstance(recorded, Mapping):
        return data
    # A run that knew of logit adjustment has a record.
    return {**data, "masking": dict(recorded), "logit_adjustment": False}


def load(
    folder: Path, *, mesh: Any, rules: axes.Rules, dtype: str | None, genes: GeneVocabulary | None
) -> pretrained.Pretrained:
    """Load the best checkpoint of a run folder as `sct.load` does a model folder.

    Only the variables are read, not the optimiser's state, each device's part alone.
    """
    config = model_folder.read_json(folder / "config.json")
    family, options = config.get("family"), config.get(MODEL, config.get("model", {}))
    if not isinstance(family, str) or not isinstance(options, dict):
        raise CheckpointError(f"{folder / 'config.json'} names no family and model: the run is damaged.")
    vocabulary = GeneVocabulary.load(folder / "genes.tsv")
    if genes is not None:
        vocabulary.check_same(genes, what=f"the run {folder}", other_what="the data")
    step, there = best_step(folder), steps(folder)
    if step not in there:
        raise CheckpointError(
            f"the best step of {folder} is {step}, but of its checkpoints only {', '.join(map(str, there))} "
            "are left: train on with the same configuration until a better one comes, or give another folder."
        )
    model = registry.model_config(family, options, len(vocabulary))
    path = (folder / "checkpoints" / str(step) / "state").absolute()
    arrays = _restore(path, pretrained.boxed_shapes(family, model), mesh, rules, dtype)
    described = model_folder.read_json(folder / "data.json")
    data = described.get("model") or pretrained.data_options(config.get("data"))
    data = with_masking(data, config)
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    made = pretrained.Pretrained(
        family, model, unflatten(arrays), vocabulary, license=described.get("license") or "unknown", step=step,
        data=data, tokenizer=tokenizer,
    )  # fmt: skip
    text = f"## Training\n\nCheckpoint of step {step:,} of a run with this configuration:\n\n```json\n"
    card = pretrained.default_card(made, f"{text}{json.dumps(config, indent=1)}\n```")
    return dataclasses.replace(made, card=card)


def _restore(path: Path, boxed: Any, mesh: Any, rules: axes.Rules, dtype: str | None) -> dict[str, Any]:
    """Read the variables of a checkpoint, and nothing else of it; `boxed` are those of the model without adapters."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def argument(name: str, leaf: Any) -> Any:
        kind = jnp.dtype(dtype) if dtype and model_folder.is_float(leaf) else leaf.dtype
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=where.get(name, whole), dtype=kind)

    try:
        saved = handler.metadata(path)
        saved = getattr(saved, "tree", saved)
        groups = {group: saved.get(group) or {} for group in ("trained", "frozen")}
        there = {**groups["trained"], **groups["frozen"]}
        boxed = lora.beside(boxed, there)
        expected = flatten(nn.unbox(boxed))
        pretrained.match(there, expected, str(path))
        where = flatten(axes.shardings(boxed, mesh, rules)) if mesh is not None else {}
        wanted = {group: leaves for group, leaves in groups.items() if leaves}
        restored = handler.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item={
                    group: {
                        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()
                    }
                    for group, leaves in wanted.items()
                },
                restore_args={
                    group: {name: argument(name, leaf) for name, leaf in leaves.items()}
                    for group, leaves in wanted.items()
                },
                partial_restore=True,
            ),
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever the storage raises for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"the checkpoint {path.parent} cannot be read ({reason}): it is damaged, give another folder."
        ) from error
    finally:
        handler.close()
    arrays = {name: value for leaves in restored.values() for name, value in leaves.items()}
    return {name: arrays[name] for name in expected}
