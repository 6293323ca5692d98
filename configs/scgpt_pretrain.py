"""Pretrain a scGPT-compatible cell encoder: a transformer over the genes of a cell and their expression values.

Without a variant, the model has the sizes of the published whole-human model (12 layers, 8 heads, width 512, 51 bins)
and is pretrained as published: of a cell's expressed genes, at most 1,199 are read, and 25%, 50% or 75% of them are
generated. Known genes attend to known genes, and generated genes to known genes and themselves. The loss is the squared
error of the generated values, predicted from the output vectors, from the cell embedding (MVC), and from the output
vectors of a second pass with the cell embedding in place of CLS:

    python -m launch.ingest --input=FILES --output=STORE --min_genes=200
    python -m launch.train --config=configs/scgpt_pretrain.py --config.data.store=STORE --workdir=runs/scgpt

    For BERT-like pretraining without the generative mask, set --config.objective.mode=masked
    --config.objective.second_pass_weight=0 --config.model.flags=False. Hardware: GPUs; with --config.train.mesh=fsdp,
    the model is divided over all of them. The time, the memory and the results of this training are not measured.

:quickstart trains a small model on real blood cells from scanpy. On 2 CPU cores, it took 1 minute. With 490 training
cells, the model learns little more than the mean of each gene: the squared error at masked genes of test cells was
8.25, beside 8.33 for the mean of the gene, 8.19 for the mean by gene and library size, and 8.06 for a regression on the
known genes of the cell:

    python -m launch.train --config=configs/scgpt_pretrain.py:quickstart --workdir=runs/scgpt
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quickstart")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the whole-human model, or of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.family = "scgpt"
    config.task = "masked_values"
    config.init_from = ""

    config.model = ConfigDict()
    config.model.vocab_size = (
        0  # 0: one row per gene of the store's vocabulary, and one each for padding and CLS
    )
    config.model.embed_dim = 512
    config.model.num_layers = 12
    config.model.num_heads = 8
    config.model.ffn_dim = 512
    config.model.dropout = 0.2
    config.model.values = "continuous"  # or category (one embedding per bin), scaling
    config.model.num_bins = 51  # zero included: 50 quantile bins for non-zero values
    config.model.norm = "post"  # or pre
    config.model.cell_embedding = "cls"  # or avg-pool, w-pool
    config.model.mvc = "inner product"  # or "inner product, detach", "concat query", "sum query", "" (no MVC)
    config.model.flags = True  # learned flags of genes to be generated
    config.model.explicit_zero = False  # predict the probability of non-zero values
    config.model.dab = False  # batch discriminator
    config.model.num_batches = 0  # 0: number of batches in the column data.batch_key
    config.model.use_batch_labels = False  # whether the heads read batch labels
    config.model.domain_norm = ""  # batch norm per batch label: plain or affine
    config.model.remat = "level"
    config.model.dtype = "bfloat16"

    config.data = ConfigDict()
    config.data.store = ""
    config.data.dataset = ""
    config.data.tokens = 0.0
    config.data.genes = "sampled"  # or top, expressed, hvg, all
    config.data.max_genes = 1199  # and CLS
    config.data.variable_genes = 0  # 0: all genes; N: the model knows only N highly variable genes
    config.data.values = "quantiles"  # or log1p, levels
    config.data.batch_key = ""  # column with batch labels, for objective.dab_weight and model.num_batches
    config.data.shared_batches = False  # whether equal labels in different studies mean the same batch

    config.objective = ConfigDict()
    config.objective.mode = "generative"  # or masked
    config.objective.mask_ratio = (0.25, 0.5, 0.75)  # each cell draws one of them
    config.objective.mask_zeros = False
    config.objective.value_weight = 1.0
    config.objective.mvc_weight = 1.0
    config.objective.second_pass_weight = 1.0
    config.objective.zero_weight = 0.0
    config.objective.ecs_weight = 0.0
    config.objective.ecs_threshold = 0.3
    config.objective.dab_weight = 0.0
    config.objective.report_cells = 500
    config.objective.report_seeds = 3

    config.adapters = ConfigDict()  # adapters to train while the model of init_from is frozen
    config.adapters.kind = ""  # low_rank (LoRA), bottleneck or prefix; empty: train the model
    config.adapters.targets = ()  # regular expressions over layer paths; empty: default of the architecture
    config.adapters.layers = ()  # block numbers, counted from 0; empty: all
    config.adapters.update(rank=8, alpha=16.0)  # options of low_rank
    config.adapters.update(width=128, scale=1.0, skip=True)  # options of bottleneck
    config.adapters.length = 64  # option of prefix

    config.optimizer = ConfigDict()
    config.optimizer.peak_lr = 1e-4
    config.optimizer.init_lr = 0.0
    config.optimizer.final_lr = 1e-5
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.moment_dtype = "float32"

    config.train = ConfigDict()
    config.train.steps = 1_000_000
    config.train.batch_size = 32
    config.train.grad_accum_steps = 1
    config.train.batch_ramp = ()
    config.train.log_every = 100
    config.train.eval_every = 10_000
    config.train.eval_records = 5_000
    config.train.checkpoint_every = 10_000
    config.train.keep_last = 2
    config.train.patience = 10
    config.train.stop_at = 0
    config.train.seed = 0
    config.train.loader_threads = 8
    config.train.mesh = "data"  # or single, fsdp, pod, or sizes: data=2,fsdp=4

    config.export = ConfigDict()
    config.export.training_cells = (
        1_000_000  # hashes of the training cells are stored up to this number; 0: none
    )

    if variant == "quickstart":
        config.model.update(embed_dim=64, num_layers=3, num_heads=4, ffn_dim=128, dropout=0.1, remat="none")
        config.model.update(dtype="float32", num_bins=11)  # small values are learned in fewer steps
        config.data.update(dataset="pbmc68k", max_genes=127)
        config.optimizer.update(peak_lr=3e-3, warmup_steps=30, final_lr=1e-5)
        config.train.update(batch_size=8, steps=500, log_every=20, eval_every=100, checkpoint_every=100)
        config.train.update(loader_threads=1, eval_records=0)
    return config
