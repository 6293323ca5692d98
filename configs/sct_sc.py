"""Train sCT on single-cell RNA-seq data, as the full model or as a small variant.

This is stage 1 of the paper; stage 2 is `sct_spatial.py`.

A bag is a group of cells that sCT reads together. A gene token is one gene in one cell.

Without a variant, the full model is trained (79 million parameters, bags of 50 cells x about 20,000 genes, 10^12 gene
tokens):

    python -m launch.train --config=configs/sct_sc.py --config.data.store=STORE --workdir=runs/sct

    Hardware: one A100 80 GB or better. With several devices, use a batch size that is a multiple of their number
    (--config.train.batch_size=8). The paper trained for five days on one A100.

:mini is a small model for a laptop and your own store. It has 2.4 million parameters, all genes of the vocabulary, bags
of 8 cells, and a mixture of masking rules (see MIXTURE). The run time was not measured:

    python -m launch.train --config=configs/sct_sc.py:mini --config.data.store=STORE --workdir=runs/mini

:quickstart uses real blood cells from scanpy (700 cells x 765 genes) and takes 4 minutes on 2 CPU cores. The expected
result is an MCC of 0.40 for masked expressed genes of held-out cells (README.md, "Results"):

    python -m launch.train --config=configs/sct_sc.py:quickstart --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

VARIANTS = ("", "mini", "quickstart")
# Masking of the small variants, which differs from the paper (docs/benchmarks.md). Each bag gets one of the three kinds
# at random. All kinds draw the share of masked genes at random for each bag, which is better at every masking ratio.
# "drawn_uniform" masks expressed and unexpressed genes at the same rate, so that probabilities are calibrated when many
# genes are masked. "drawn_genes" masks genes in all cells of the bag, as sct.tl.impute does.
MIXTURE = (("drawn", 1.0), ("drawn_uniform", 1.0), ("drawn_genes", 1.0))


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the paper's recipe, or of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.family = "sct"
    config.task = "masked_expression"
    config.init_from = ""  # model folder of a pretrained model

    config.model = ConfigDict()
    config.model.num_genes = 0  # 0: size of the store's vocabulary, padded
    config.model.num_bins = 5  # expression levels, including "unexpressed"
    config.model.token_embed_dim = 64
    config.model.embed_dim = 1024
    config.model.num_downsamples = 8
    config.model.num_layers = 4
    config.model.num_heads = 16
    config.model.ffn_dim = 2048
    config.model.norm = "shared"  # or shared_fixed, layer, none (ablations)
    config.model.pool = "avg"  # or max, as in the text of the paper
    config.model.conv_boundary = "flat"  # or cell: convolutions do not cross cell borders
    config.model.rotary = True
    config.model.use_spatial = False
    config.model.remat = "level"
    config.model.dtype = "bfloat16"
    config.model.code_dim = 0  # 64: a code of each cell, which objective.cell_decoding trains

    config.data = ConfigDict()
    config.data.store = ""
    config.data.dataset = ""
    config.data.cells_per_bag = 50  # cells that the model reads together
    config.data.shuffle_cells = 0
    config.data.thinning = ()  # (0.2, 1.0): keep a random share of the molecules of each training cell
    config.data.label_key = ""  # column of obs with labels of cells, for objective.label_contrast
    config.data.tokens = 1e12  # gene tokens in training, if train.steps is 0

    config.objective = ConfigDict()
    config.objective.masking = ConfigDict()
    config.objective.masking.kind = "stratified"
    config.objective.masking.expressed = 0.15  # share of expressed genes that are masked
    config.objective.masking.unexpressed = 0.01  # share of unexpressed genes that are masked
    config.objective.masking.low = 0.05  # low and high: range of the random rate of the kinds "drawn..."
    config.objective.masking.high = 0.95
    config.objective.masking.num_cells = 1
    config.objective.masking.mixture = ()  # for kind "mixture": kinds and weights, (("drawn", 1.0), ("cells", 1.0))
    config.objective.logit_adjustment = True  # False: the paper's loss, which predicts "expressed" too often
    config.objective.max_masked_fraction = (
        0.05  # largest share of positions at which the loss is computed in training
    )
    config.objective.cell_decoding = (
        0.0  # weight of predicting all genes from the code of a cell (model.code_dim)
    )
    config.objective.cell_decoding_genes = 0  # genes per bag at which training computes this loss; 0: all
    config.objective.skip_dropout = 0.0  # probability of training a bag without skip connections
    config.objective.contrast = 0.0  # weight of recognizing a cell in a second masking
    config.objective.label_contrast = (
        0.0  # weight of similar vectors for cells with the same label (data.label_key)
    )
    config.objective.contrast_temperature = 0.1
    config.objective.monitor = "loss"  # or cell_decoding: validation metric that chooses the best step
    config.objective.report_ratio = 0.15
    config.objective.report_seeds = 5
    config.objective.report_bags = 0  # number of held-out bags in the final table, evenly spaced; 0: all bags

    config.adapters = ConfigDict()  # adapters to train while the model of init_from is frozen
    config.adapters.kind = ""  # low_rank (LoRA), bottleneck or prefix; empty: train the model
    config.adapters.targets = ()  # regular expressions over layer paths; empty: default of the architecture
    config.adapters.layers = ()  # block numbers, counted from 0; empty: all
    config.adapters.update(rank=8, alpha=16.0)  # options of low_rank
    config.adapters.update(width=128, scale=1.0, skip=True)  # options of bottleneck
    config.adapters.length = 64  # option of prefix

    config.optimizer = ConfigDict()
    config.optimizer.peak_lr = 1e-4
    config.optimizer.init_lr = 5e-5
    config.optimizer.final_lr = 0.0
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0
    config.optimizer.moment_dtype = "float32"  # bfloat16 halves the memory of the first moment

    config.train = ConfigDict()
    config.train.steps = 0  # 0: computed from data.tokens
    config.train.batch_size = 1
    config.train.grad_accum_steps = 1  # sequential microbatches; activations need 1/N of the memory
    config.train.batch_ramp = ()  # ((1_000, 2), (5_000, 4)): batch size 2 up to step 1,000, then 4 up to step 5,000
    config.train.log_every = 100
    config.train.eval_every = 5_000
    config.train.eval_records = 1_000  # number of validation bags, evenly spaced; 0: all bags
    config.train.checkpoint_every = 5_000
    config.train.keep_last = 2
    config.train.patience = 10
    config.train.stop_at = 0
    config.train.seed = 0
    config.train.loader_threads = 4
    config.train.mesh = "data"  # or single, fsdp, pod, or sizes: data=2,fsdp=4 (also sequence, tensor)

    config.export = ConfigDict()
    config.export.readout_dim = 64  # dimensions of the readout "fitted"; 0: none
    config.export.readout_source = "flat"  # or conv
    config.export.readout_standardize = False  # True: divide each feature by its standard deviation first
    config.export.readout_cells = 20_000  # about so many training cells fit it
    config.export.training_cells = (
        1_000_000  # hashes of the training cells are stored up to this number; 0: none
    )

    if variant in ("mini", "quickstart"):
        config.model.update(dtype="float32", remat="none", num_layers=2)
        config.optimizer.update(clip_norm=1.0, final_lr=2e-5, init_lr=2e-4)
        config.data.tokens = 0.0
    if variant == "mini":
        config.model.update(token_embed_dim=32, embed_dim=192, num_heads=6, ffn_dim=384, num_downsamples=6)
        config.data.cells_per_bag = 8
        config.objective.masking.update(kind="mixture", mixture=MIXTURE, low=0.05, high=0.95)
        config.objective.update(report_bags=25, max_masked_fraction=0.5)
        config.optimizer.update(peak_lr=1e-3, warmup_steps=50)
        config.train.update(steps=1_000, log_every=10, eval_every=100, checkpoint_every=100, eval_records=25)
    if variant == "quickstart":
        config.model.update(token_embed_dim=32, embed_dim=64, num_heads=2, ffn_dim=128, num_downsamples=5)
        config.data.update(dataset="pbmc68k", cells_per_bag=16, shuffle_cells=4096)
        config.objective.max_masked_fraction = 0.0
        config.objective.masking.update(kind="mixture", mixture=MIXTURE, low=0.05, high=0.5)
        config.optimizer.update(peak_lr=4e-3, warmup_steps=30)
        config.train.update(batch_size=2, steps=600, log_every=20, eval_every=100, checkpoint_every=100)
        config.train.loader_threads = 1
    return config
