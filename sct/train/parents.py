"""Find the other runs whose models a configuration uses, and whether these runs must be trained first."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sct.checks import check_type
from sct.errors import ConfigError
from sct.train import resume
from sct.weights import model_folder, run_folder

SECTION = "builds_on"
_FIELDS = ("option", "workdir", "config")
# Everything that a run writes to its folder before its first checkpoint. Temporary files begin with a dot.
_BEGUN = re.compile(
    rf"\..*|store|checkpoints|tensorboard|metrics\.jsonl|{run_folder.TOKENIZER}|{run_folder.CONFIG}"
    rf"|{run_folder.DATA}|{run_folder.GENES}"
)


@dataclasses.dataclass(frozen=True)
class ParentRun:
    """A run whose model another configuration uses.

    Attributes
    ----------
    name
        Name in the section `builds_on`.
    option
        Option of the configuration that names the model, such as "data.cell_encoder".
    workdir
        Run folder, as written in the configuration.
    config
        Configuration that trains the model.
    """

    name: str
    option: str
    workdir: str
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Absolute path of the run folder."""
        return _absolute(self.workdir)

    def is_ready(self) -> bool:
        """Return whether the folder holds a finished run or a model. If not, the run must be trained or resumed.

        Raises
        ------
        ConfigError
            The folder holds neither a run nor a model.
        CheckpointError
            The run is damaged.
        """
        folder = self.folder
        if model_folder.find(folder) is not None:
            return True
        if run_folder.is_run(folder):
            return resume.is_finished(folder)
        if model_folder.find(folder / "model") is not None:
            return True
        is_begun = not folder.exists() or (
            folder.is_dir() and all(_BEGUN.fullmatch(file.name) for file in folder.iterdir())
        )
        if not is_begun:
            raise ConfigError(
                f"{self.option} is {self.workdir}, which is neither a run folder nor a model folder: rename this "
                f"folder, so that the model can be trained there, or set --config.{self.option} to a trained model."
            )
        return False


def split(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[ParentRun, ...]]:
    """Separate a configuration from the runs that it builds on.

    Parameters
    ----------
    config
        Configuration as a nested dict. Its optional section `builds_on` maps names to entries with the fields `option`,
        `workdir` and `config`: the model in `option` comes from the run `workdir`, which `config` trains.

    Returns
    -------
    Two values: the configuration without `builds_on`, and the runs. A run is left out if the value of its `option` was
    changed to a model other than the one in `workdir`. Different spellings of the same folder, such as `runs/x` and
    `./runs/x/`, do not count as a change.

    Raises
    ------
    ConfigError
        The section `builds_on` does not have this form, or it names an option that the configuration does not have.
    """
    values = dict(config)
    section = values.pop(SECTION, None) or {}
    check_type(SECTION, section, Mapping, "a section of named runs")
    parents = []
    for name, entry in section.items():
        check_type(f"{SECTION}.{name}", entry, Mapping, "a section of named options")
        if set(entry) != set(_FIELDS):
            raise ConfigError(
                f"{SECTION}.{name} has the fields {', '.join(entry) or 'none'}, but it must have {', '.join(_FIELDS)}: "
                "add or remove fields."
            )
        check_type(f"{SECTION}.{name}.config", entry["config"], Mapping, "a configuration with sections")
        parent = ParentRun(name, str(entry["option"]), str(entry["workdir"]), entry["config"])
        model = _value(values, parent)
        if isinstance(model, str) and model and _absolute(model) == parent.folder:
            parents.append(parent)
    return values, tuple(parents)


def _absolute(path: str) -> Path:
    """Return the absolute path of a folder, without `..`. If the user of `~name` does not exist, `~name` is kept."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _value(config: Mapping[str, Any], parent: ParentRun) -> Any:
    """Return the value of the option that names the model of a run."""
    found: Any = config
    for name in parent.option.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise ConfigError(
                f"{SECTION}.{parent.name}.option is {parent.option!r}, but the configuration has no such option: "
                "correct the name."
            )
        found = found[name]
    return found
