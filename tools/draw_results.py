"""Draw the figures of results for the README from a run of the quick start (`make quickstart`).

    python tools/draw_results.py runs/quickstart docs/images

The program writes `umap.png`, a UMAP of the embedding of all 700 cells, and `mcc_by_ratio.png`, the imputation of the
140 held-out cells by the model and by baselines. It takes about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import scanpy as sc

import sct

BENCHMARK = Path(__file__).resolve().parents[1] / "configs" / "benchmark.py"

# Row of the benchmark -> label in the figure. The other rows either repeat a method on other cells or are near 0.
LABELS = {
    "model": "sCT",
    "model, given expressed": "sCT, knows which genes are expressed",
    "most common expressed level per gene, other cells of the study": "most common expressed level per gene",
    "kNN smoothing, k = 5, training studies": "kNN smoothing of the training cells",
    "kNN smoothing, k = 5, training studies, given expressed": "kNN smoothing, knows which genes are expressed",
    "MAGIC, these cells, given expressed": "MAGIC, knows which genes are expressed",
}


def draw_umap(run: Path, output: Path) -> None:
    """Write a UMAP of the quick-start cells in the embedding of the model, colored by cell type."""
    cells = sct.datasets.pbmc68k()
    sct.tl.embed(cells, run)
    sc.pp.neighbors(cells, use_rep="X_sct")
    sc.tl.umap(cells)
    sct.pl.umap(cells, color="cell_type", save=output)


def draw_imputation(run: Path, output: Path) -> None:
    """Write the MCC of the model and of baselines for each masking ratio, measured on the held-out cells of the run."""
    config = runpy.run_path(str(BENCHMARK))["get_config"]().to_dict()
    config["data"]["path"] = str(run / "store")
    for part in ("natural_imputation", "cell_imputation", "embedding"):
        config[part]["run"] = False
    with tempfile.TemporaryDirectory() as folder:
        config["output"] = folder
        sct.tl.benchmark(config, model=run)
        (protocol,) = json.loads((Path(folder) / "results.json").read_text())["imputation"]
    curves = {label: protocol["curves"][row] for row, label in LABELS.items()}
    models = [label for row, label in LABELS.items() if row.startswith("model")]
    reference = LABELS["most common expressed level per gene, other cells of the study"]
    sct.pl.mcc_by_ratio(curves, models=models, reference=[reference], save=output)


def main() -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of the quick start")
    parser.add_argument("images", type=Path, help="folder of the figures")
    given = parser.parse_args()
    draw_umap(given.run, given.images / "umap.png")
    draw_imputation(given.run, given.images / "mcc_by_ratio.png")


if __name__ == "__main__":
    main()
