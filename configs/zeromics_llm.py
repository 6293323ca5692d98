"""Instruction tuning of ZerOmics: LLaMA-2 answers questions about cells that it reads as 500 soft tokens.

The paper's sizes: LLaMA-2-13B, frozen, with a mixture of low-rank adapters (one for all tasks and one for each), the
cell model of configs/zeromics_sc.py, frozen, and a linear tokenizer between them. What is said of each study stands in
a YAML file (docs/zeromics.md):

    python -m launch.train --config=configs/zeromics_llm.py --config.data.store=STORE \
        --config.data.studies=STUDIES.yaml --config.data.cells=runs/zeromics_sc --config.data.llm=LLAMA_FOLDER \
        --workdir=runs/zeromics_llm

:quickstart, a small LLaMA from random parameters on real blood cells that come with scanpy, on 2 CPU cores, after the
quickstart of zeromics_sc with the run folder runs/zeromics_sc. What it learns it learns from 490 cells: that a question
about other studies or tasks is answered takes a LLaMA that was trained on text.

    python -m launch.train --config=configs/zeromics_llm.py:quickstart --workdir=runs/zeromics_llm
"""

from ml_collections import ConfigDict

VARIANTS = ("", "quickstart")


def get_config(variant: str = "") -> ConfigDict:
    """The paper's recipe, or a small variant of it."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS[1:])}")
    config = ConfigDict()
    config.family = "zeromics"
    config.task = "instructions"
    config.init_from = ""  # a run of this configuration

    config.model = ConfigDict()
    config.model.num_soft = 500
    config.model.tokenizer = "linear"  # or pooled (small models), none (ablation, with num_soft=1)
    config.model.cells = ConfigDict()  # the sizes are those of data.cells
    config.model.cells.dtype = "bfloat16"
    config.model.cells.remat = "level"
    config.model.cells.dropout = 0.0
    config.model.cells.encoder = (
        "transformer"  # or weighted, an ablation: texts of genes weighted by expression
    )
    config.model.llm = ConfigDict()  # the sizes are those of data.llm
    config.model.llm.dtype = "bfloat16"
    config.model.llm.remat = "level"
    config.model.llm.dropout = 0.0

    config.data = ConfigDict()
    config.data.store = ""
    config.data.dataset = ""
    config.data.tokens = 0.0
    config.data.cells = ""  # run or model folder of the cell model
    config.data.llm = ""  # Hugging Face folder of LLaMA
    config.data.genes = ""  # as of the cell model, as well as values and max_genes
    config.data.values = "quantiles"
    config.data.max_genes = 0
    config.data.studies = ""  # YAML file with abstracts, cell types, rare ones, diseases
    config.data.length = 1536
    config.data.cell_type = "cell_type"  # columns of obs, "" for none
    config.data.disease = "disease"
    config.data.pathways = ""  # active pathways of each cell, "hypoxia, apoptosis", for the task cpi
    config.data.normal = ("normal", "healthy")
    config.data.rare_share = 0.05
    config.data.tokenizer = ""
    config.data.vocab_size = 4_096

    config.objective = ConfigDict()
    config.objective.tasks = (("cta", 1.0), ("rci", 1.0), ("tcd", 1.0))
    config.objective.prompts = ""  # JSON file with further templates
    config.objective.rank = 8
    config.objective.alpha = 8.0
    config.objective.dropout = 0.0
    config.objective.universal = True  # ablations: leave the universal adapter, or those of tasks, out
    config.objective.of_tasks = True
    config.objective.members = ()  # adapters of init_from, where it was trained on other tasks
    config.objective.train_llm = False
    config.objective.train_cells = False
    config.objective.report_cells = 500
    config.objective.report_seeds = 3

    config.optimizer = ConfigDict()
    config.optimizer.peak_lr = 5e-4
    config.optimizer.init_lr = 0.0
    config.optimizer.final_lr = 0.0
    config.optimizer.warmup_steps = 500
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.optimizer.moment_dtype = "float32"

    config.train = ConfigDict()
    config.train.steps = 50_000
    config.train.batch_size = 64
    config.train.accumulate = 1
    config.train.batch_ramp = ()
    config.train.log_every = 100
    config.train.eval_every = 1_000
    config.train.eval_records = 1_000
    config.train.checkpoint_every = 1_000
    config.train.keep_last = 2
    config.train.patience = 10
    config.train.stop_at = 0
    config.train.seed = 0
    config.train.loader_threads = 8
    config.train.mesh = "fsdp"  # or single, data, pod, or sizes: fsdp=4,tensor=2

    if variant == "quickstart":
        config.model.num_soft = 16
        config.model.cells.update(dtype="float32", remat="none")
        config.model.llm.update(
            vocab_size=0,
            embed_dim=96,
            num_layers=3,
            num_heads=4,
            ffn_dim=256,
            max_length=512,
            dtype="float32",
            remat="none",
            dropout=0.1,
        )
        config.data.update(dataset="pbmc68k", cells="runs/zeromics_sc", max_genes=512, length=192, disease="")
        config.data.vocab_size = 1_024
        config.objective.tasks = (("cta", 2.0), ("rci", 1.0))
        config.objective.train_llm = True
        config.optimizer.update(peak_lr=2e-3, warmup_steps=30, final_lr=1e-5, weight_decay=0.1)
        config.train.update(batch_size=16, steps=250, log_every=10, eval_every=50, checkpoint_every=50)
        config.train.update(loader_threads=1, eval_records=0, mesh="data")
    return config
