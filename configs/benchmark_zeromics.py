"""Benchmark zero-shot and few-shot answers to questions about cells of unseen studies (ZerOmics, Tables 1 to 4).

    python -m launch.benchmark --config=configs/benchmark_zeromics.py --config.model=runs/zeromics_llm \
        --config.data.path=cells.h5ad --config.data.disease=disease --config.pathways.file=h.all.symbols.gmt

The benchmark has four tasks:

- cell types: accuracy, macro F1
- rare cells: kappa, F1 of "Yes"
- tumor cells: accuracy, F1; all diseases count as one class
- pathways: AUROC and AUPRC; the true labels are computed from the ranks of the genes in each cell

The abstract of a study is read from `adata.uns["abstract"]` or from the YAML file `data.studies`. Two thirds of the
cells of each study are training cells, and one third are test cells. Baselines are fitted on the training cells. The
cells for few-shot fine-tuning are also chosen from the training cells. All methods answer the same questions about the
test cells. The folder --output gets the tables and all numbers as report.html, report.md, report.json and results.json.

:quick uses one random seed and the test cells of the quick start (blood cells from scanpy). The model is fine-tuned
once on one cell and once on five cells for each possible answer. The model comes from the run folder runs/zeromics_llm,
which zeromics_llm:quickstart makes. If this run is not finished, the model is trained first.

    python -m launch.benchmark --config=configs/benchmark_zeromics.py:quick
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

VARIANTS = ("", "quick")

_MODEL = runpy.run_path(str(Path(__file__).with_name("zeromics_llm.py")))


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the full benchmark, or of the variant "quick"."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.benchmark = "instructions"
    config.model = ""  # model folder or run folder of zeromics_llm
    config.output = "runs/benchmark_zeromics"
    config.tasks = ()  # cell_type, rare_cell, tumor, pathway; (): all tasks whose columns or gene sets are set
    # Numbers of cells of each answer for few-shot fine-tuning (for pathways: of cells in total).
    # The model without fine-tuning is always measured.
    config.shots = (1, 5, 10)
    config.seeds = 3  # each seed has its own template, order of candidates, few-shot cells and control
    config.templates = 1  # N: average over the first N templates; 1: one template, chosen by the seed
    config.batch_size = 8
    # JSON file of marker genes {"B cell": ["MS4A1", ...]}; "": find markers in the two thirds for baselines.
    config.markers = ""

    config.data = ConfigDict()
    config.data.path = ""  # .h5ad, .zarr or a store
    config.data.dataset = ""  # instead of a path: pbmc68k
    config.data.split = "test"  # split of a store to ask about
    config.data.studies = ""  # YAML file with abstracts and candidates; overrides adata.uns
    config.data.cell_type = "cell_type"  # column of obs; "": no cell types
    config.data.disease = ""  # column of obs; "": no diseases
    config.data.normal = ("normal", "healthy")  # values of data.disease that mean no disease
    config.data.rare_share = 0.05  # a type is rare if its share of the cells of the study is below this
    config.data.group_key = ""  # column of obs, such as the donor; all cells of a group are in the same part
    config.data.share = 1 / 3  # share of the cells (or groups) that the questions are about
    config.data.layer = ""
    config.data.gene_column = ""
    config.data.duplicates = "error"
    config.data.study_key = ""  # column of obs that divides a file into studies
    config.data.max_cells = 3_000  # number of cells drawn at random from each study; 0: all cells
    config.data.seed = 0

    config.pathways = ConfigDict()
    config.pathways.file = ""  # GMT file, such as the hallmark gene sets of MSigDB
    config.pathways.names = ()  # names of gene sets; (): all in the file
    config.pathways.deviations = (
        1.0  # a set is active if its score is this many standard deviations above the mean
    )

    config.tuning = ConfigDict()
    config.tuning.steps = 50
    config.tuning.learning_rate = 5e-4
    config.tuning.batch_size = 8

    if variant == "quick":
        config.seeds = 1
        config.shots = (1, 5)
        config.data.dataset = "pbmc68k"
        config.model = "runs/zeromics_llm"
        config.builds_on = ConfigDict()  # runs that are trained first if they do not exist
        config.builds_on.model = ConfigDict()
        config.builds_on.model.option = "model"  # option that names the run
        config.builds_on.model.workdir = "runs/zeromics_llm"
        config.builds_on.model.config = _MODEL["get_config"]("quickstart")
    return config
