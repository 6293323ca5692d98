"""Benchmark a model zero-shot against baselines, on an .h5ad file or a store (sCT paper, section 4).

    python -m launch.benchmark --config=configs/benchmark.py --config.model=runs/mine --config.data.path=cells.h5ad
    python -m launch.benchmark --config=configs/benchmark.py --config.model=runs/mine --config.data.path=STORE

The benchmark has these parts. A bag is a group of cells that sCT reads together.

- Natural imputation: 15% of the measured genes are masked, whether or not they are expressed. All masked positions are
  scored. This part measures the calibration of the probabilities and the expected counts.
- Gene imputation of the paper: 15, 30, 40 or 80% of the genes are masked at random. Only expressed genes are scored.
- Cell imputation: 1, 10, 20 or 40 cells of a bag of 50 cells are masked.
- Fixed genes: the same set of genes is masked in all cells. Results are grouped by the fraction of cells in which a
  gene has zero counts. By default, this part runs only for cells with spatial coordinates.
- Embedding: all readouts of the model and several baselines are compared with the labels of the cells. This part needs
  labeled cells. The baseline "zero-shot PCA" (principal components of the training cells, applied unchanged) also needs
  the training studies.

The folder --output gets tables, plots and all numbers as report.html, report.md and report.json. If `data.path`
is a store, the studies of the test split are scored, and baselines are also fitted on the training studies. If
`data.path` is a file, set `--config.data.train=STORE` to the store that the model was trained on.

:quick is a short test run. It uses one random draw and a few bags, and it leaves out the slow baselines.

    python -m launch.benchmark --config=configs/benchmark.py:quick --config.model=runs/mine --config.data.path=c.h5ad
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the full benchmark, or of the variant "quick"."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.model = ""  # model folder, run folder or Hub id; "": only baselines
    config.genes = ""  # without a model: a vocabulary file, or "" for all human protein-coding genes
    config.output = "runs/benchmark"
    config.seeds = 5

    config.data = ConfigDict()
    config.data.path = ""  # .h5ad, .zarr or a store
    config.data.split = "test"  # split of a store to score
    config.data.train = ""  # store of the training studies; not needed if `path` is a store
    config.data.layer = ""
    config.data.gene_column = ""
    config.data.duplicates = "error"
    config.data.study_key = ""  # column of obs that divides a file into studies, donors or slides
    config.data.spatial_key = "spatial"  # key of obsm with positions; used if it exists
    config.data.label_key = "cell_type"  # column of obs with labels; used if it exists
    config.data.batch_key = ""  # column of obs with batches, for integration metrics
    config.data.cells_per_bag = 0  # 0: the number of cells per bag in training
    config.data.max_bags = 100  # number of bags scored in imputation, evenly spaced; 0: all bags
    config.data.max_cells = 10_000  # number of cells drawn at random from each study; 0: all cells
    config.data.seed = 0

    config.natural_imputation = ConfigDict()
    config.natural_imputation.run = True
    config.natural_imputation.ratio = 0.15
    config.natural_imputation.whole_genes = True  # also hide genes in all cells, as sct.tl.impute does

    config.gene_imputation = ConfigDict()
    config.gene_imputation.run = True
    config.gene_imputation.ratios = (0.15, 0.30, 0.40, 0.80)
    config.gene_imputation.magic = True

    config.cell_imputation = ConfigDict()
    config.cell_imputation.run = True
    # Masked cells per bag; (0,): 1, 10, 20 and 40 of 50 cells, scaled to the bag size.
    config.cell_imputation.numbers = (0,)

    config.fixed_genes = ConfigDict()
    config.fixed_genes.run = "spatial"  # "always", "never", or "spatial" for cells with spatial coordinates
    config.fixed_genes.per_group = 25

    config.embedding = ConfigDict()
    config.embedding.run = True
    config.embedding.k = 5
    config.embedding.folds = 5
    config.embedding.resolution = 1.0
    config.embedding.scvi = True
    config.embedding.readouts = ()  # readouts of the model, each in its own row; (): all
    config.embedding.training_cells = (
        20_000  # training cells that zero-shot PCA is fitted on; 0: leave it out
    )

    if variant == "quick":
        config.seeds = 1
        config.data.update(max_bags=4, max_cells=500)
        config.gene_imputation.update(ratios=(0.15, 0.8), magic=False)
        config.embedding.scvi = False
    return config
