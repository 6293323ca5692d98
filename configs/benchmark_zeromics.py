"""Questions about cells of unseen studies, zero- and few-shot, beside honest baselines (ZerOmics, Tables 1 to 4).

    python -m launch.benchmark --config=configs/benchmark_zeromics.py --config.model=runs/zeromics_llm \
        --config.data.path=cells.h5ad --config.data.disease=disease --config.pathways.file=h.all.symbols.gmt

Cell types (accuracy, macro F1), rare cells (kappa, F1 of "Yes"), tumour cells (accuracy, F1, diseases folded into one)
and pathways (AUROC and AUPRC) against labels by the ranks of their genes. The abstract of the study stands in
`adata.uns["abstract"]` or in the file of `data.studies`. Each study is divided: two thirds are what baselines are
fitted on and few-shot cells are drawn from, and all methods answer about the same third. Tables and all numbers are
written to `config.output` as report.html, report.md, report.json and results.json.

:quick, one seed, one and five shots, on the test cells of the quickstart of zeromics_llm, whose run is the model:

    python -m launch.benchmark --config=configs/benchmark_zeromics.py:quick --config.model=runs/zeromics_llm
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick")


def get_config(variant: str = "") -> ConfigDict:
    """The whole benchmark, or a quick look."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS[1:])}")
    config = ConfigDict()
    config.benchmark = "instructions"
    config.model = ""  # model folder or run folder of zeromics_llm
    config.output = "runs/benchmark_zeromics"
    config.tasks = ()  # of cta, rci, tcd, cpi; (): those for which columns and gene sets are named
    # Cells of each answer, for cpi in all, to tune on; zero shots are measured always.
    config.shots = (1, 5, 10)
    config.seeds = 3  # each with its wording and order of candidates, its few-shot cells and its control
    config.templates = 1  # wordings of a question to average over, the first ones; 1: that of the seed
    config.batch_size = 8
    # Of cell types, a JSON file {"B cell": ["MS4A1", ...]}; "": markers are found where baselines are fitted.
    config.markers = ""

    config.data = ConfigDict()
    config.data.path = ""  # .h5ad, .zarr or a store
    config.data.dataset = ""  # instead of a path: pbmc68k
    config.data.split = "test"  # of a store
    config.data.studies = ""  # YAML file with abstracts and candidates, before what adata.uns says
    config.data.cell_type = "cell_type"  # columns of obs, "" for none
    config.data.disease = ""
    config.data.normal = ("normal", "healthy")
    config.data.rare_share = 0.05
    config.data.group_key = ""  # column of obs, such as the donor: no group is in both parts
    config.data.share = 1 / 3  # of the cells (or groups), to ask about
    config.data.layer = ""
    config.data.gene_column = ""
    config.data.duplicates = "error"
    config.data.study_key = ""  # column of obs that divides a file into studies
    config.data.max_cells = 3_000  # cells of a study, drawn at random; 0: all
    config.data.seed = 0

    config.pathways = ConfigDict()
    config.pathways.file = ""  # GMT file, such as MSigDB's hallmark gene sets
    config.pathways.names = ()  # those of these names; (): all of the file
    config.pathways.deviations = (
        1.0  # a set is active this many standard deviations above the cells' mean score
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
