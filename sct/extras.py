"""Import optional libraries when they are needed, and tell the user how to install a missing one."""

from __future__ import annotations

import importlib
from typing import Any

from sct.errors import MissingExtraError
from sct.version import DISTRIBUTION


def missing_extra(library: str, extra: str, what: str = "") -> MissingExtraError:
    """Return the error for a library that is not installed, with the pip command that installs it.

    Parameters
    ----------
    library
        Name of the library on the package index.
    extra
        Name of the pip extra of this project that includes the library.
    what
        Name of the function or task that needs the library, such as "a plot". The message begins with this name.
    """
    found = f"{what} needs {library}" if what else f"{library} is not installed"
    return MissingExtraError(f'{found}: pip install "{DISTRIBUTION}[{extra}]"')


def load_extra(module: str, extra: str, library: str = "", what: str = "") -> Any:
    """Import a module of an optional library.

    Parameters
    ----------
    module
        Module to import.
    extra, what
        See `missing_extra`.
    library
        Name of the library on the package index. Default: the name of the module.

    Raises
    ------
    MissingExtraError
        The library is not installed. If the library is installed but its import fails, the original error is raised.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise missing_extra(library or module, extra, what) from None
