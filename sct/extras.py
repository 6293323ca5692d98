"""Optional libraries: imported where they are used, and what to install where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from sct.errors import MissingExtraError
from sct.version import DISTRIBUTION


def missing_extra(library: str, extra: str, what: str = "") -> MissingExtraError:
    """Error of a library that is not installed, with the pip command of the extra that brings it.

    Parameters
    ----------
    library
        Name of the library on the package index.
    extra
        Extra of this project that declares it.
    what
        What needs the library, as the subject of a sentence.
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
        As in `missing_extra`.
    library
        Name of the library on the package index; that of the module by default.

    Raises
    ------
    MissingExtraError
        The library is not installed. An installed library that cannot load its own parts raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise missing_extra(library or module, extra, what) from None
