"""Train the cell model of ZerOmics: a transformer over the genes of a cell, aligned with texts about these genes.

A gene feature is a vector computed from a text about a gene. A bin is a class of expression values: bin 0 for zero, and
higher bins for quantiles of a cell's non-zero values.

Without a variant, the model has the sizes of the paper (12 layers, 12 heads, 10 bins). A text model computes the gene
features. The features are computed once and cached (docs/zeromics.md). In this command, the text model is LLaMA-2 from
a Hugging Face folder that contains the tokenizer:

    python -m launch.ingest --input=FILES --output=STORE --min_genes=201
    python -m launch.train --config=configs/zeromics_sc.py --config.data.store=STORE \
        --config.data.corpus=SUMMARIES.tsv --config.data.features=LLAMA_FOLDER --workdir=runs/zeromics_sc

    The model reads all genes of a cell (20,000 tokens). To read only the most highly expressed genes, set
    --config.data.max_genes=2048 --config.objective.max_masked_fraction=0.2. This setting needs a tenth of the tokens,
    but the model no longer sees which genes are unexpressed. Hardware: the paper used eight A100 of 80 GB.

:quickstart trains a small model on real blood cells from scanpy. The gene features come from latent semantic analysis
of the built-in gene texts. The training takes a few minutes on 2 CPU cores:

    python -m launch.train --config=configs/zeromics_sc.py:quickstart --workdir=runs/zeromics_sc
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quickstart")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the paper's recipe, or of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.family = "zeromics_cells"
    config.task = "masked_bins"
    config.init_from = ""

    config.model = ConfigDict()
    config.model.num_genes = 0  # 0: size of the store's vocabulary
    config.model.feature_dim = 0  # 0: dimension of the gene features
    config.model.num_bins = 10
    config.model.embed_dim = 768
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.ffn_dim = 3072
    config.model.dropout = 0.0
    config.model.remat = "level"
    config.model.dtype = "bfloat16"

    config.data = ConfigDict()
    config.data.store = ""
    config.data.dataset = ""
    config.data.tokens = 0.0
    config.data.genes = ""  # all, top, sampled, expressed; empty: all, or top with max_genes
    config.data.values = "quantiles"  # or levels (bins of equal width)
    config.data.max_genes = 0  # 0: all genes; N: the N most highly expressed genes of each cell
    config.data.corpus = "built_in"  # or a file with one text per gene
    config.data.features = "lsa"  # or a text model (folder), "random", or a file with one vector per gene
    config.data.features_cache = ""
    config.data.feature_dim = 256  # dimension of the gene features of lsa and random

    config.objective = ConfigDict()
    config.objective.masked = 0.15  # share of non-zero bins that are masked
    config.objective.substituted = 0.1  # share of the other non-zero bins that are replaced by another bin
    config.objective.max_masked_fraction = (
        0.05  # largest share of genes in the loss: 15% of the expressed genes, at most a third of all genes
    )
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
    config.optimizer.final_lr = 0.0
    config.optimizer.warmup_steps = 1_000
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.optimizer.moment_dtype = "float32"

    config.train = ConfigDict()
    config.train.steps = 100_000
    config.train.batch_size = 64
    config.train.grad_accum_steps = 1
    config.train.batch_ramp = ()
    config.train.log_every = 100
    config.train.eval_every = 2_000
    config.train.eval_records = 1_000
    config.train.checkpoint_every = 2_000
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
        config.model.update(
            embed_dim=96, num_layers=2, num_heads=4, ffn_dim=192, remat="none", dtype="float32"
        )
        config.data.update(dataset="pbmc68k", max_genes=512, feature_dim=64)
        config.objective.update(max_masked_fraction=0.25)
        config.optimizer.update(peak_lr=1e-3, warmup_steps=30, final_lr=1e-5)
        config.train.update(batch_size=8, steps=400, log_every=20, eval_every=100, checkpoint_every=100)
        config.train.update(loader_threads=1, eval_records=0)
    return config
