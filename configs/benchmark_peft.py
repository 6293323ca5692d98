"""Compare methods of fine-tuning for cell types on labeled cells, in the layout of Table 3 of the scPEFT paper.

    python -m launch.benchmark --config=configs/benchmark_peft.py --config.model=runs/mine \
        --config.data.path=cells.h5ad --config.data.label_key=cell_type --config.data.donor_key=donor

The model is fine-tuned with each method that its architecture supports: full, classifier, prefix, lora, gene_token and
gene_encoder. All methods get the same training, validation and test cells. Beside them stand the native model (label
transfer by the nearest neighbors of its embeddings) and methods without a pretrained model: logistic regression and
nearest neighbors on principal components, correlation to the mean of each type (as SingleR), and logistic regression on
scaled expression (as CellTypist).

With --config.data.donor_key, 80% of the donors are used for training, one of which is the validation donor, and the
other donors are the test. Without it, cells are divided at random within each type. The learning rate of each method is
chosen on the validation cells of the first seed.

:quick is a short test run, with one seed, one learning rate and at most five epochs.

    python -m launch.benchmark --config=configs/benchmark_peft.py:quick --config.model=runs/mine \
        --config.data.path=cells.h5ad
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quick")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the full benchmark, or of the variant "quick"."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.benchmark = "peft"
    config.model = ""  # model folder, run folder or Hub id
    config.output = "runs/benchmark_peft"
    config.methods = ()  # empty: all methods that the architecture supports
    config.seeds = 3
    config.learning_rates = (1e-3, 1e-4)
    config.class_weights = "none"  # or balanced
    config.epochs = 100
    config.batch_size = 0  # 0: 32 cells, or fewer if the model reads many genes
    config.patience = 10  # epochs

    config.data = ConfigDict()
    config.data.path = ""  # .h5ad, .zarr or a store
    config.data.label_key = "cell_type"  # column of obs with the labels
    config.data.split_key = ""  # column of obs with the values train, validation and test
    config.data.donor_key = ""  # column of obs with the donors; empty: divide cells at random
    config.data.test_fraction = 0.2
    config.data.split_seed = 0
    config.data.shots = 0  # number of training cells per type; 0: all
    config.data.layer = ""
    config.data.gene_column = ""
    config.data.duplicates = "error"

    config.peft = ConfigDict()
    config.peft.update(rank=20, alpha=20.0)  # options of lora
    config.peft.length = 64  # option of prefix
    config.peft.update(width=128, scale=1.0, skip=True)  # options of gene_token and gene_encoder
    config.peft.layers = ()  # block numbers, counted from 0; empty: upper half for gene_encoder, otherwise all

    if variant == "quick":
        config.update(seeds=1, learning_rates=(1e-3,), epochs=5, patience=2)
    return config
