"""Zero- and few-shot benchmark of questions about cells of unseen studies, with baselines (ZerOmics, Tables 1 to 4).

    python -m launch.benchmark --config=configs/benchmark_zeromics.py --config.model=runs/zeromics_llm \
        --config.data.path=cells.h5ad --config.data.disease=disease --config.pathways.file=h.all.symbols.gmt

Tasks and metrics: cell types (accuracy, macro F1), rare cells (kappa, F1 of "Yes"), tumor cells (accuracy, F1; all
diseases count as one class), and pathways (AUROC and AUPRC; the labels come from the ranks of the genes).

The abstract of a study is in `adata.uns["abstract"]` or in the file `data.studies`. Each study is divided. Baselines
are fitted on two thirds, and few-shot cells come from the same part. All methods answer about the remaining third.
Tables and all numbers are written to `config.output` as report.html, report.md, report.json and results.json.

:quick uses one seed, one and five shots, and the test cells of the quick start. The model is the run of
zeromics_llm:quickstart.

    python -m launch.benchmark --config=configs/benchmark_zeromics.py:quick --config.model=runs/zeromics_llm
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick")


def get_config(variant: str = "") -> ConfigDict:
    """Full benchmark, or the variant "quick"."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS[1:])}")
    config = ConfigDict()
    config.benchmark = "instructions"
    config.model = ""  # model folder or run folder of zeromics_llm
    config.output = "runs/benchmark_zeromics"
    config.tasks = ()  # of cell_type, rare_cell, tumor, pathway; (): those for which columns and gene sets are named
    # Cells per answer for fine-tuning (for pathways: in total). Zero-shot is always measured.
    config.shots = (1, 5, 10)
    config.seeds = 3  # each with its own template, candidate order, few-shot cells and control
    config.templates = 1  # average over the first N templates; 1: the template of the seed
    config.batch_size = 8
    # JSON file of marker genes {"B cell": ["MS4A1", ...]}; "": find markers in the cells for baselines.
    config.markers = ""

    config.data = ConfigDict()
    config.data.path = ""  # .h5ad, .zarr or a store
    config.data.dataset = ""  # instead of a path: pbmc68k
    config.data.split = "test"  # split of a store
    config.data.studies = ""  # YAML file with abstracts and candidates; overrides adata.uns
    config.data.cell_type = "cell_type"  # columns of obs, "" for none
    config.data.disease = ""
    config.data.normal = ("normal", "healthy")
    config.data.rare_share = 0.05
    config.data.group_key = ""  # column of obs, such as the donor; a group is never in both parts
    config.data.share = 1 / 3  # share of the cells (or groups) in the test part
    config.data.layer = ""
    config.data.gene_column = ""
    config.data.duplicates = "error"
    config.data.study_key = ""  # column of obs that divides a file into studies
    config.data.max_cells = 3_000  # random sample of cells per study; 0: all
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
    return config
