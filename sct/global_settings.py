"""Define the settings of a Python session, `sct.settings`: verbosity, cache folder and device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sct import devices
from sct.errors import ConfigError

CACHE_VARIABLE = "SCT_CACHE_DIR"
_FOLDER = "~/.cache/sct"
ERRORS, WARNINGS, INFO, HINTS = range(4)
_LEVELS = ("errors", "warnings", "info", "hints")
_NAMES = {
    "error": ERRORS, "errors": ERRORS, "warning": WARNINGS, "warnings": WARNINGS, "info": INFO, "progress": INFO,
    "hint": HINTS, "hints": HINTS, "debug": HINTS,
}  # fmt: skip


class Settings:
    """Settings of a Python session. Assign an attribute to change a setting: `sct.settings.verbosity = "warnings"`.

    Attributes
    ----------
    verbosity
        Amount of printed messages. 0 or "errors": only errors. 1 or "warnings": also warnings. 2 or "info": also
        notices, tables and progress bars (the default). 3 or "hints": also hints, such as the device and the time that
        a step took.
    cache_dir
        Folder of all caches: compiled programs and gene features. Default: the environment variable SCT_CACHE_DIR, or
        `~/.cache/sct` if this variable is not set.
    device
        Kind of device on which models run: "auto" (the best kind that JAX finds), "cpu", "gpu" or "tpu". Set the device
        before the first computation.
    """

    __slots__ = ("_cache_dir", "_device", "_verbosity")

    def __init__(self) -> None:
        self._verbosity, self._device = INFO, "auto"
        self._cache_dir: Path | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(
                f"sct.settings has no setting {name!r}: choose from {', '.join(_DESCRIBED)}."
            )
        super().__setattr__(name, value)

    @property
    def verbosity(self) -> int:
        """Return the amount of printed messages, from 0 (only errors) to 3 (also hints)."""
        return self._verbosity

    @verbosity.setter
    def verbosity(self, value: int | str) -> None:
        level = _NAMES.get(value.lower()) if isinstance(value, str) else value
        if type(level) is not int or not ERRORS <= level <= HINTS:
            expected = ", ".join(f"{number} ({name})" for number, name in enumerate(_LEVELS))
            raise ConfigError(
                f"settings.verbosity is {value!r}, but it must be a level or its name: choose from {expected}."
            )
        self._verbosity = level

    @property
    def cache_dir(self) -> Path:
        """Folder of all caches."""
        return self._cache_dir or _absolute(os.environ.get(CACHE_VARIABLE) or _FOLDER, CACHE_VARIABLE)

    @cache_dir.setter
    def cache_dir(self, value: str | os.PathLike[str]) -> None:
        if not isinstance(value, str | os.PathLike) or not str(value):
            raise ConfigError(
                f"settings.cache_dir is {value!r}, but it must be the path of a folder: set it to a path such as "
                f"{_FOLDER!r}."
            )
        folder = _absolute(value, "settings.cache_dir")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(
                f"settings.cache_dir is {folder}, which is a file, but it must be a folder: choose another path."
            )
        self._cache_dir = folder

    @property
    def device(self) -> str:
        """Kind of device on which models run."""
        return self._device

    @device.setter
    def device(self, value: str) -> None:
        devices.use(value)
        self._device = value

    def __repr__(self) -> str:
        shown = {
            "verbosity": f"{self.verbosity} ({_LEVELS[self.verbosity]})",
            "cache_dir": str(self.cache_dir),
            "device": self.device,
        }
        width = max(map(len, shown.values()))
        rows = [
            f"{name:<9}  {shown[name]:<{width}}  {described}".rstrip()
            for name, described in _DESCRIBED.items()
        ]
        if max(map(len, rows)) > 80:  # the folder has a long path
            rows = [f"{name:<9}  {value}" for name, value in shown.items()]
        return "\n".join(["sct.settings", *rows])


_DESCRIBED = {
    "verbosity": "0 errors, 1 warnings, 2 info, 3 hints",
    "cache_dir": f"or set ${CACHE_VARIABLE}",
    "device": ", ".join(devices.DEVICES),
}


def _absolute(path: str | os.PathLike[str], option: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"{option} is {os.fspath(path)!r}, which begins with the home folder of a user that does not exist: write "
            "the path in full."
        ) from error


settings = Settings()
