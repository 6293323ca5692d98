"""Load a model from the checkpoints of a run folder, and verify the files of the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sct import messages
from sct.atomic import write_json
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.tokenizer import Tokenizer
from sct.errors import CheckpointError, first_line
from sct.hashes import SEAL, files_below, first_changed, hash_files, is_changed, sealed
from sct.models import classifier, lora, registry
from sct.nn import axes
from sct.nn.paths import flatten, unflatten
from sct.weights import model_folder, pretrained

# TOKENIZER: sub-folder of a run on text. MODEL, STEPS: entries of the run's config.json with the complete architecture
# and with the number of steps.
TOKENIZER, MODEL, STEPS = "tokenizer", "resolved_model", "resolved_steps"
# Files of a run: its options, the description of its data, and its genes. HASHES: key in data.json for file hashes.
CONFIG, DATA, GENES, HASHES = "config.json", "data.json", "genes.tsv", "hashes"
# RECORD: file in a checkpoint with the hashes of its other files. FILES: key in that file.
RECORD, FILES = "sha256.json", "files"


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a run folder, in ascending order."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*") if p.name.isdigit())


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder with at least one checkpoint."""
    return (folder / "config.json").is_file() and bool(steps(folder))


def best_step(folder: Path) -> int:
    """Return the step of the best checkpoint of a run. The newest checkpoint records this step.

    If the run has no validation yet, return the step of the newest checkpoint.

    Raises
    ------
    CheckpointError
        The newest checkpoint is damaged.
    """
    best = progress(folder)["best_step"]
    return steps(folder)[-1] if best is None else int(best)


def progress(folder: Path) -> dict[str, Any]:
    """Return the fields of `RunProgress` by name, as recorded in the newest checkpoint of a run.

    Raises
    ------
    CheckpointError
        The newest checkpoint is damaged.
    """
    path = folder / "checkpoints" / str(steps(folder)[-1]) / "progress" / "metadata"
    verify_checkpoint(path.parent.parent, only=("progress",))
    found = {"best_step": None, "stale": 0, **model_folder.read_json(path)}
    for name, kinds in (("best_step", (int, type(None))), ("stale", (int,))):
        if not isinstance(found[name], kinds):
            raise CheckpointError(
                f"{path} has {name} = {found[name]!r}, but it must be a whole number: the checkpoint is damaged, so "
                f"delete the checkpoint folder {path.parent.parent}."
            )
    return found


def is_current(folder: Path, exported: Path) -> bool:
    """Return whether the exported model of a run comes from the best step of the run.

    The best step can change if the run is trained further.
    """
    return model_folder.read_config(exported).get("step") == best_step(folder)


def read(path: Path) -> dict[str, Any]:
    """Read `config.json` or `data.json` of a run folder.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or was changed after it was written.
    """
    content = model_folder.read_json(path)
    if is_changed(content):
        raise CheckpointError(
            f"{path} is damaged or was changed after the run wrote it (its {SEAL} does not match): restore it from a "
            f"copy, or delete the entry {SEAL!r} if you changed the file on purpose."
        )
    return content


def hashed_files(folder: Path) -> dict[str, str]:
    """Return the hashes of the genes and the tokenizer of a run folder.

    The genes and the tokenizer define what the inputs of the model mean.
    """
    tokenizer = folder / TOKENIZER
    names = [f"{TOKENIZER}/{name}" for name in files_below(tokenizer)] if tokenizer.is_dir() else []
    return hash_files(folder, [GENES, *names])


def verify_files(folder: Path, described: Mapping[str, Any]) -> None:
    """Check that the genes and the tokenizer of a run folder have not changed since the run started.

    Parameters
    ----------
    folder
        Run folder.
    described
        Content of `data.json` in the run folder.

    Raises
    ------
    CheckpointError
        A file is missing or was changed.

    Warns
    -----
    UserWarning
        `data.json` has no hashes.
    """
    recorded = described.get(HASHES)
    if recorded is None:
        _note(folder / DATA, "genes")
        return
    _check(folder, recorded, folder / DATA, "restore it from a copy, or choose another run folder")


def check_genes(vocabulary: GeneVocabulary, described: Mapping[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` if the genes of a run folder differ from the hash in its `data.json`."""
    named = described.get("vocabulary_hash")
    if named != vocabulary.hash:
        raise CheckpointError(
            f"{folder / GENES} has hash {vocabulary.hash[:16]}, but {DATA} expects {str(named)[:16]}: copy {GENES} "
            "from the store that the run was trained on."
        )


def record_checkpoint(folder: Path) -> None:
    """Write the hashes of the files of a checkpoint.

    Call this function before the checkpoint folder is renamed, because the new name marks the folder as complete.
    """
    names = [name for name in files_below(folder) if "/" in name]
    write_json(folder / RECORD, sealed({FILES: hash_files(folder, names)}))


def verify_checkpoint(
    folder: Path, only: Collection[str] = (), shared: bool = False, instead: str = "to do without it"
) -> None:
    """Check that the files of a checkpoint have not changed since they were written.

    Parameters
    ----------
    folder
        Checkpoint folder of one step.
    only
        Items (sub-folders) to check. Default: all.
    shared
        Whether all processes load the checkpoint. If True, each process checks only its share of the files.
    instead
        Part of the error message. It says what happens after the user deletes the damaged checkpoint.

    Raises
    ------
    CheckpointError
        A file is missing or was changed.

    Warns
    -----
    UserWarning
        The checkpoint has no hashes and `only` is empty.
    """
    if not (folder / RECORD).is_file():
        if not only:
            _note(folder, "files")
        return
    advice = f"delete the checkpoint folder {folder} {instead}"
    content = model_folder.read_json(folder / RECORD)
    recorded = content.get(FILES)
    if SEAL not in content or is_changed(content) or not isinstance(recorded, dict):
        raise CheckpointError(f"{folder / RECORD} is damaged: {advice}.")
    chosen = {name: value for name, value in recorded.items() if not only or name.split("/")[0] in only}
    _check(folder, chosen, folder / RECORD, advice, shared)


def _check(
    folder: Path, recorded: Mapping[str, str], named_in: Path, advice: str, shared: bool = False
) -> None:
    try:
        changed = first_changed(folder, recorded, shared)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror}): check its permissions."
        ) from error
    if changed is not None:
        found = (
            f"is damaged or was changed after it was written (its sha256 differs from the one in {named_in.name})"
            if (folder / changed).exists()
            else f"is missing, but it is listed in {named_in.name}"
        )
        raise CheckpointError(f"{folder / changed} {found}: {advice}.")


def _note(path: Path, what: str) -> None:
    messages.warn(
        f"{path} was written by an earlier release and has no hashes of the {what}, so changes cannot be detected: "
        "check yourself that nothing was changed.",
    )


def check_finite_arrays(arrays: Mapping[str, jax.Array], path: Path) -> None:
    """Raise `CheckpointError` if a checkpoint has a NaN or infinite weight. Each process checks its own shards."""
    for name, value in arrays.items():
        for part in value.addressable_shards:
            if part.replica_id == 0:
                model_folder.check_finite_array(np.asarray(part.data), name, path)


def with_masking(data: Any, config: Mapping[str, Any]) -> Any:
    """Add the masking options of a run to the data section of its model, and return the data section.

    If the data section has no masking options, they are copied from the configuration of the run.
    """
    objective = config.get("objective")
    recorded = objective.get("masking") if isinstance(objective, Mapping) else None
    if not isinstance(data, Mapping) or "masking" in data or not isinstance(recorded, Mapping):
        return data
    # Releases with logit adjustment always record the masking, so this run did not use it.
    return {**data, "masking": dict(recorded), "logit_adjustment": False}


def _measured_at_end(folder: Path, step: int) -> dict[str, Any]:
    """Return the entry of the data record that the evaluation of a finished run adds: the temperature of a classifier.

    The exported model holds it. It applies only to the checkpoint that was exported.
    """
    try:
        exported = model_folder.read_config(folder / "model")
    except CheckpointError:
        return {}
    data = exported.get("data")
    if exported.get("step") != step or not isinstance(data, Mapping) or pretrained.ANNOTATION not in data:
        return {}
    return {pretrained.ANNOTATION: data[pretrained.ANNOTATION]}


def load(
    folder: Path,
    *,
    mesh: Any,
    rules: axes.AxisRules,
    dtype: str | None,
    genes: GeneVocabulary | None,
    step: int | None = None,
) -> pretrained.Pretrained:
    """Load a checkpoint of a run folder, by default the best one; see `sct.load` for the parameters.

    Only the variables are read, not the optimizer state. Each device reads only its own shard.

    Raises
    ------
    CheckpointError
        A file of the run is damaged or was changed, or the checkpoint does not exist.
    StoreError
        `genes` differs from the vocabulary of the run.
    """
    config, described = read(folder / CONFIG), read(folder / DATA)
    family, options = config.get("family"), config.get(MODEL, config.get("model", {}))
    if not isinstance(family, str) or not isinstance(options, dict):
        raise CheckpointError(
            f"{folder / 'config.json'} has no valid entries 'family' and 'model': the file is damaged, so restore it "
            "from a copy."
        )
    verify_files(folder, described)
    vocabulary = GeneVocabulary.load(folder / GENES)
    check_genes(vocabulary, described, folder)
    if genes is not None:
        vocabulary.check_same(genes, what=f"the run {folder}", other_what="the data")
    available = steps(folder)
    if step is not None and step not in available:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}: choose one of the steps {', '.join(map(str, available))} (a "
            "run keeps the latest train.keep_last checkpoints and the best one)."
        )
    step = best_step(folder) if step is None else step
    if step not in available:
        raise CheckpointError(
            f"the best step of {folder} is {step}, but only the checkpoints {', '.join(map(str, available))} are left: "
            "continue the training until it finds a better checkpoint, or give another folder."
        )
    kind = registry.family(family).config
    options = registry.with_current_names(kind, options, "model", recorded=True)
    model = registry.model_config(family, options, len(vocabulary))
    verify_checkpoint(folder / "checkpoints" / str(step), shared=pretrained.spans_processes(mesh))
    path = (folder / "checkpoints" / str(step) / "state").absolute()
    arrays = _restore(path, pretrained.boxed_shapes(family, model), mesh, rules, dtype)
    data = described.get("model") or pretrained.data_options(config.get("data"))
    data = {**with_masking(data, config), **_measured_at_end(folder, step)}
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    made = pretrained.Pretrained(
        family, model, unflatten(arrays), vocabulary, license=described.get("license") or "unknown", step=step,
        data=data, tokenizer=tokenizer,
    )  # fmt: skip
    config = {name: value for name, value in config.items() if name != SEAL}
    text = f"## Training\n\nCheckpoint of step {step:,} of a run with this configuration:\n\n```json\n"
    card = pretrained.default_card(made, f"{text}{json.dumps(config, indent=1)}\n```")
    return dataclasses.replace(made, card=card)


def parameters(folder: Path, step: int) -> int:
    """Return the number of parameters in a checkpoint of a run, without reading the weights.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be read.
    """
    import orbax.checkpoint as ocp

    path = (folder / "checkpoints" / str(step) / "state").absolute()
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(path)
        saved = getattr(saved, "tree", saved)
        groups = [saved.get(group) or {} for group in ("trained", "frozen")]
        return sum(int(np.prod(leaf.shape)) for leaves in groups for leaf in leaves.values())
    except Exception as error:  # for damaged files, orbax raises errors of many types
        raise CheckpointError(
            f"the checkpoint {path.parent} cannot be read ({first_line(error)}): it is damaged, so give another folder."
        ) from error
    finally:
        handler.close()


def _restore(path: Path, boxed: Any, mesh: Any, rules: axes.AxisRules, dtype: str | None) -> dict[str, Any]:
    """Read only the variables of a checkpoint.

    `boxed` holds the shapes and logical axis names of the variables of the model without adapters.
    """
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
        stored = {**groups["trained"], **groups["frozen"]}
        boxed = classifier.beside(lora.beside(boxed, stored), stored)
        expected = flatten(nn.unbox(boxed))
        pretrained.match(stored, expected, str(path))
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
    except Exception as error:  # for damaged files, orbax raises errors of many types
        raise CheckpointError(
            f"the checkpoint {path.parent} cannot be read ({first_line(error)}): it is damaged, so give another folder."
        ) from error
    finally:
        handler.close()
    arrays = {name: value for leaves in restored.values() for name, value in leaves.items()}
    check_finite_arrays(arrays, path)
    return {name: arrays[name] for name in expected}
