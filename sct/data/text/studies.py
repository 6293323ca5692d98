"""Read YAML files with metadata of studies: one entry per study, with fields such as its abstract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sct.errors import ConfigError


def read_study_file(path: str | Path, form: str) -> dict[str, dict[Any, Any]]:
    """Read a metadata file as a dict from study name to entry. The caller checks the fields of the entries.

    Parameters
    ----------
    path
        YAML file.
    form
        Example of an entry, which error messages show.

    Raises
    ------
    ConfigError
        The file cannot be read, or is not a mapping of study names to mappings.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the study metadata in {path} cannot be read ({error}): check that the path is right and that the file "
            "is valid YAML."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise wrong_form(path, form)
    return {str(study): entry for study, entry in content.items()}


def wrong_form(path: str | Path, form: str) -> ConfigError:
    """Return the error for a file with an unexpected format."""
    return ConfigError(f"{path} must have the form `{form}`: rewrite the file in this form.")
