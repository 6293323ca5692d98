"""The file in which people say what studies are about: YAML, an entry with fields for each study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sct.errors import ConfigError


def read_study_file(path: str | Path, form: str) -> dict[str, dict[Any, Any]]:
    """Entries by the name of their study; what a field may hold is checked by whoever knows the fields.

    Parameters
    ----------
    path
        YAML file.
    form
        What an entry looks like, for messages.

    Raises
    ------
    ConfigError
        It cannot be read, or is no mapping of studies to mappings.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the texts of studies in {path} cannot be read ({error}): check the file."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise wrong_form(path, form)
    return {str(study): entry for study, entry in content.items()}


def wrong_form(path: str | Path, form: str) -> ConfigError:
    """The error of a file of another form."""
    return ConfigError(f"{path} is not of the form `{form}`: write it like this.")
