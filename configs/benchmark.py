"""Zero-shot benchmark of a model beside honest baselines, on any .h5ad file or store (sCT paper, section 4).

    python -m launch.benchmark --config=configs/benchmark.py --config.model=runs/mine --config.data.path=cells.h5ad
    python -m launch.benchmark --config=configs/benchmark.py --config.model=runs/mine --config.data.path=STORE

Natural imputation (15% of the measured genes are hidden, expressed or not, and all are scored: calibration, expected
counts); the paper's imputation of genes masked at random (15, 30, 40, 80%; scored where expressed); of whole cells (1,
10, 20, 40 of 50); with positions, of fixed genes by sparsity; and embeddings, where cells have labels. Tables, plots
and all numbers are written to `config.output` as report.html, report.md and report.json. A store is measured on its
test studies, with baselines fitted on its training studies as well; for a file, `--config.data.train=STORE` names the
store of the model's training.

:quick, one draw on a few bags, without the slow baselines, to see that everything runs:

    python -m launch.benchmark --config=configs/benchmark.py:quick --config.model=runs/mine --config.data.path=c.h5ad
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick")


def get_config(variant: str = "") -> ConfigDict:
    """The whole benchmark, or a quick look."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS[1:])}")
    config = ConfigDict()
    config.model = ""  # model folder, run folder or hub id; "": baselines alone
    config.genes = ""  # without a model: a vocabulary file, or "" for all human protein-coding genes
    config.output = "runs/benchmark"
    config.seeds = 5

    config.data = ConfigDict()
    config.data.path = ""  # .h5ad, .zarr or a store
    config.data.split = "test"  # of a store
    config.data.train = ""  # store whose training studies the model has seen; a store at `path` is its own
    config.data.layer = ""
    config.data.gene_column = ""
    config.data.duplicates = "error"
    config.data.study_key = ""  # column of obs that divides a file into studies, donors or slides
    config.data.spatial_key = "spatial"  # used where it is there
    config.data.label_key = "cell_type"  # used where it is there
    config.data.batch_key = ""  # for the metrics of integration
    config.data.cells_per_bag = 0  # 0: as in training
    config.data.max_bags = 100  # bags scored in imputation, spread evenly; 0: all
    config.data.max_cells = 10_000  # cells of a study, drawn at random; 0: all
    config.data.seed = 0

    config.natural_imputation = ConfigDict()
    config.natural_imputation.run = True
    config.natural_imputation.ratio = 0.15
    config.natural_imputation.whole_genes = True  # and genes hidden in all cells, as sct.tl.impute hides them

    config.gene_imputation = ConfigDict()
    config.gene_imputation.run = True
    config.gene_imputation.ratios = (0.15, 0.30, 0.40, 0.80)
    config.gene_imputation.magic = True

    config.cell_imputation = ConfigDict()
    config.cell_imputation.run = True
    config.cell_imputation.numbers = (0,)  # (0,): 1, 10, 20, 40 of 50, in proportion to the bag

    config.fixed_genes = ConfigDict()
    config.fixed_genes.run = "spatial"  # "always", "never", or "spatial" for data with positions
    config.fixed_genes.per_group = 25

    config.embedding = ConfigDict()
    config.embedding.run = True
    config.embedding.k = 5
    config.embedding.folds = 5
    config.embedding.resolution = 1.0
    config.embedding.scvi = True

    if variant == "quick":
        config.seeds = 1
        config.data.update(max_bags=4, max_cells=500)
        config.gene_imputation.update(ratios=(0.15, 0.8), magic=False)
        config.embedding.scvi = False
    return config
