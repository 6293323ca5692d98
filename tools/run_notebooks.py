"""Run the notebooks, store their outputs, and write their Colab badges.

    python tools/run_notebooks.py             # full settings; writes the outputs of good runs into notebooks/
    python tools/run_notebooks.py 03 04       # only the notebooks whose names start with these
    python tools/run_notebooks.py --quick     # small settings; changes no file
    python tools/run_notebooks.py --badges    # only writes the Colab badges

Each notebook runs in a new kernel and an empty folder. A run fails if a cell raises an error, or if an output is not
fit for readers: an error message of a command, a warning, text on standard error, a control sequence of a terminal, or
a path of this machine. With --quick, warnings about the small model are accepted.

The metadata of a notebook record the hash of its code cells and the version of sct with which it was run. Edits of
markdown cells therefore need no new run.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sct.atomic import write_text  # noqa: E402
from sct.version import REPOSITORY, __version__  # noqa: E402

FOLDER = ROOT / "notebooks"
RECORD = "sct"  # key in the metadata of a notebook
TIMEOUT = 3600  # seconds for one cell, on a busy machine
# Values that --quick sets after the cell tagged "parameters", by notebook.
QUICK: dict[str, dict[str, Any]] = {
    "01_embed_annotate": {"STEPS": 20},
    "02_impute": {"STEPS": 20},
    "03_train": {"STEPS": 12, "STOP_AT": 6},
    "04_cell2sentence": {"STEPS": 12, "CELLS": 3},
    "05_zeromics": {"CELL_STEPS": 8, "STEPS": 8, "CELLS": 20},
    "06_finetune": {"STEPS": 12, "EPOCHS": 1},
    "08_benchmark": {"STEPS": 12, "SEEDS": 1},
}
# A model that was trained for a few steps names few cells.
ACCEPTED_IF_QUICK = ("of the cells are 'unknown'", "have the same label")
PROBLEMS = {
    "an error": re.compile(r"^\s*(\S*[Ee]rror:|Traceback|FATAL|sct: )", re.MULTILINE),
    "a warning": re.compile(r"\b\w*Warning\b|^\s*warning:", re.MULTILINE),
    "a control character": re.compile(r"[\x00-\x08\x0b-\x1f\x7f]"),
    "a path of this machine": re.compile(r"(?<![\w.:/<])/(home|root|tmp|work|usr|var|opt|mnt)/"),
}


def notebooks() -> list[Path]:
    """Return the paths of all notebooks, in their order."""
    return sorted(FOLDER.glob("*.ipynb"))


def source_hash(notebook: Any) -> str:
    """Return the SHA-256 of the sources of the code cells."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\0\n".join(code).encode()).hexdigest()


def record(notebook: Any) -> dict[str, str]:
    """Return what the metadata record about a run of the notebook as it is now."""
    return {"code_sha256": source_hash(notebook), "version": __version__}


def texts(notebook: Any) -> Iterator[tuple[int, str, str]]:
    """Yield the cell number, the stream ("stdout", "stderr" or "") and the text of all text outputs."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()) if cell.cell_type == "code" else ():
            if output.output_type == "stream":
                yield number, output.name, output.text
            elif output.output_type == "error":
                yield number, "", f"Traceback: {output.ename}: {output.evalue}"
            else:
                for kind, content in output.get("data", {}).items():
                    if kind.startswith("text/"):
                        yield number, "", content


def problems(notebook: Any, accepted: Sequence[str] = ()) -> list[str]:
    """Return why the outputs of a notebook are not fit for readers; empty if they are.

    Parameters
    ----------
    notebook
        Notebook with outputs.
    accepted
        Parts of warnings that are not a problem. Only the lines of these warnings are left out.
    """
    found = []
    for number, stream, text in texts(notebook):
        for part in accepted:
            # Python prints the line of code that caused a warning, indented, below the warning.
            text = re.sub(rf"^.*{re.escape(part)}.*\n?(  .*\n?)?", "", text, flags=re.MULTILINE)
        if stream == "stderr" and text.strip():
            found.append(f"cell {number} wrote to standard error: {text[:500]}")
        for what, pattern in PROBLEMS.items():
            match = pattern.search(text)
            if match is not None:
                start = max(0, match.start() - 100)
                found.append(f"cell {number} shows {what}: {text[start : match.end() + 300]!r}")
    return found


def set_badge(notebook: Any, name: str) -> None:
    """Write the Colab badge below the title, or remove it if the project has no address."""
    lines = notebook.cells[0].source.split("\n")
    lines = [line for line in lines if "colab-badge" not in line]
    while len(lines) > 1 and not lines[1].strip():
        del lines[1]
    badge = colab_badge(name)
    notebook.cells[0].source = "\n".join([lines[0], "", *([badge, ""] if badge else []), *lines[1:]])


def colab_badge(name: str) -> str:
    """Return the Markdown of the Colab badge of a notebook; empty if the project has no address on GitHub."""
    host, _, project = (REPOSITORY or "").removeprefix("https://").partition("/")
    if host != "github.com":
        return ""
    address = f"https://colab.research.google.com/github/{project}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def run(path: Path, quick: bool) -> Any:
    """Return the notebook with the outputs of a new run.

    Parameters
    ----------
    path
        Notebook.
    quick
        Use the settings of `QUICK`.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("execution", None)
    added = None
    if quick:
        where = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
        lines = [f"{name} = {value!r}" for name, value in QUICK[path.stem].items()]
        added = where[0] + 1
        notebook.cells.insert(added, nbformat.v4.new_code_cell("\n".join(lines)))
    with tempfile.TemporaryDirectory(prefix="notebook") as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            startup_timeout=300,
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        # The cell with the error keeps its traceback, which `problems` reports.
        with contextlib.suppress(CellExecutionError):
            client.execute()
    if added is not None:
        del notebook.cells[added]
    return notebook


def tidy(notebook: Any) -> None:
    """Remove what differs between machines, and record the run."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = output.text.replace("\r\n", "\n")
            picture = output.get("data", {}).get("image/png")
            if picture is not None:
                output.data["image/png"] = smaller(picture)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        RECORD: record(notebook),
    }


def smaller(picture: str) -> str:
    """Return a PNG picture (base64) with at most 128 colors, which needs about a third of the space."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    written = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(written, format="png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def prepare_environment(quick: bool) -> None:
    """Set the variables with which kernels start."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # On a busy machine, XLA prints lines about slow compilations.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # The import of umap-learn asks for ipywidgets, which no notebook needs.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    if quick:  # compile quickly, as in the tests
        from tests import quick as compilation

        compilation.prepare()


def cpu_seconds() -> float:
    """Return the CPU time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Run the program and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="start of the names of the notebooks to run; default: all")
    parser.add_argument("--quick", action="store_true", help="small settings; changes no file")
    parser.add_argument(
        "--output", type=Path, help="with --quick: folder for the notebooks with their outputs"
    )
    parser.add_argument("--badges", action="store_true", help="only write the Colab badges")
    options = parser.parse_args()
    chosen = [path for path in notebooks() if not options.names or path.name.startswith(tuple(options.names))]
    if not chosen:
        parser.error(f"no notebook in {FOLDER} starts with {', '.join(options.names)}")
    if options.badges:
        for path in chosen:
            notebook = nbformat.read(path, as_version=4)
            set_badge(notebook, path.stem)
            write_text(path, nbformat.writes(notebook) + "\n")
        return 0
    prepare_environment(options.quick)
    failed = 0
    for path in chosen:
        before, cpu = time.monotonic(), cpu_seconds()
        try:
            notebook = run(path, options.quick)
        except (TimeoutError, RuntimeError) as error:  # a cell takes too long, or the kernel died
            print(f"{path.name}: failed: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        tidy(notebook)
        found = problems(notebook, ACCEPTED_IF_QUICK if options.quick else ())
        print(
            f"{path.name}: {'failed' if found else 'passed'} in {time.monotonic() - before:.0f} s "
            f"({cpu_seconds() - cpu:.0f} s of CPU time)",
            flush=True,
        )
        for each in found:
            print(f"  {each}", file=sys.stderr, flush=True)
        if found:
            failed += 1
        if options.quick and options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, options.output / path.name)
        if not options.quick and not found:
            set_badge(notebook, path.stem)
            write_text(path, nbformat.writes(notebook) + "\n")
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
