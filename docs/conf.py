"""Sphinx configuration of the documentation site; `make docs` builds it.

The build reads only files of this repository, so it works without a network. Notebooks are shown with the outputs that
they contain and are not executed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_ext")]

from sphinx.ext.napoleon import NumpyDocstring  # noqa: E402

import sct  # noqa: E402
from sct.version import REPOSITORY, __version__  # noqa: E402

# `sct.datasets` is an attribute of the package; Sphinx looks for a module of this name.
sys.modules["sct.datasets"] = sct.datasets

project = "sct"
author = "The sct authors"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "config_reference",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
# Names in single backticks are code, as in the docstrings of scanpy.
default_role = "literal"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
# Commands in notebooks may continue on the next line, which the lexer does not know. A test compiles other examples.
suppress_warnings = ["misc.highlighting_failure"]

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = False
# A section Returns is prose here, as in scanpy, but napoleon reads each of its lines as a type. It also reads the words
# before a colon in the docstring of a property as a type.
NumpyDocstring._consume_returns_section = lambda self, preprocess_types=False: [
    ("", "", self._dedent(self._consume_to_next_section()))
]
NumpyDocstring._parse_attribute_docstring = lambda self: list(self._lines)

# The last line of a command may be a comment, and prompts are not part of a command.
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = f"sct {__version__}"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "use_repository_button": True,
        "path_to_docs": "docs",
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


def copy_notebooks() -> None:
    """Copy `notebooks/*.ipynb` to `docs/tutorials`, because Sphinx reads only files below `docs`."""
    folder = DOCS / "tutorials"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        # Cells may have lines such as `!sct train`, which are not Python.
        notebook["metadata"].setdefault("language_info", {"name": "python"})["pygments_lexer"] = "ipython3"
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")


shutil.rmtree(DOCS / "api", ignore_errors=True)  # pages of names that no longer exist
copy_notebooks()
