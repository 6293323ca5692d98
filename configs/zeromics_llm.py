"""Train ZerOmics by instruction tuning, so that LLaMA-2 answers questions about cells.

A soft token is a vector computed from a cell. LLaMA reads soft tokens in the same way as word embeddings. Each cell has
500 soft tokens in this configuration.

Without a variant, the model has the sizes of the paper. LLaMA-2-13B is frozen. A mixture of low-rank adapters is
trained: one adapter for all tasks, and one adapter per task. The cell model of configs/zeromics_sc.py is frozen too. A
linear cell tokenizer computes the soft tokens from the output of the cell model. The file STUDIES.yaml has the metadata
of the studies (docs/zeromics.md):

    python -m launch.train --config=configs/zeromics_llm.py --config.data.store=STORE \
        --config.data.studies=STUDIES.yaml --config.data.cell_encoder=runs/zeromics_sc \
        --config.data.llm=LLAMA_FOLDER --workdir=runs/zeromics_llm

:quickstart trains a small LLaMA from random initialization on real blood cells from scanpy, on 2 CPU cores. If the
folder runs/zeromics_sc has no finished cell model, zeromics_sc:quickstart is trained there first. The small LLaMA
learns from only 490 cells. To answer questions about other studies or tasks, use a LLaMA that was pretrained on text.

    python -m launch.train --config=configs/zeromics_llm.py:quickstart --workdir=runs/zeromics_llm
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

VARIANTS = ("", "quickstart")

_CELL_MODEL = runpy.run_path(str(Path(__file__).with_name("zeromics_sc.py")))


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the paper's recipe, or of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.family = "zeromics"
    config.task = "instructions"
    config.init_from = ""  # run folder of this configuration

    config.model = ConfigDict()
    config.model.num_soft = 500  # soft tokens per cell
    config.model.tokenizer = "linear"  # or pooled (small models), none (ablation, with num_soft=1)
    config.model.cells = ConfigDict()  # sizes come from data.cell_encoder
    config.model.cells.dtype = "bfloat16"
    config.model.cells.remat = "level"
    config.model.cells.dropout = 0.0
    config.model.cells.encoder = (
        "transformer"  # or weighted (ablation): text features of genes, weighted by expression
    )
    config.model.llm = ConfigDict()  # sizes come from data.llm
    config.model.llm.dtype = "bfloat16"
    config.model.llm.remat = "level"
    config.model.llm.dropout = 0.0

    config.data = ConfigDict()
    config.data.store = ""
    config.data.dataset = ""
    config.data.tokens = 0.0
    config.data.cell_encoder = ""  # run folder or model folder of the cell model
    config.data.llm = ""  # Hugging Face folder with LLaMA
    config.data.genes = ""  # genes, values and max_genes: the same as for the cell model
    config.data.values = "quantiles"
    config.data.max_genes = 0
    config.data.studies = ""  # YAML file with abstracts, cell types, rare types, diseases
    config.data.length = 1536  # tokens per instruction, with answer and soft tokens
    config.data.cell_type = "cell_type"  # column of obs; "": no cell types
    config.data.disease = "disease"  # column of obs; "": no diseases
    config.data.pathways = ""  # column of obs for the task pathway, as in "hypoxia, apoptosis"
    config.data.normal = ("normal", "healthy")  # values of data.disease that mean no disease
    config.data.rare_share = 0.05  # a type is rare if its share of the cells of the study is below this
    config.data.tokenizer = ""
    config.data.vocab_size = 4_096

    config.objective = ConfigDict()
    config.objective.tasks = (("cell_type", 1.0), ("rare_cell", 1.0), ("tumor", 1.0))
    config.objective.prompts = ""  # JSON file with more templates
    config.objective.rank = 8
    config.objective.alpha = 8.0
    config.objective.dropout = 0.0
    config.objective.universal = True  # False: no adapter for all tasks (ablation)
    config.objective.of_tasks = True  # False: no adapters per task (ablation)
    config.objective.members = ()  # adapters of the model in init_from, if that model was trained on other tasks
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
    config.train.grad_accum_steps = 1
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

    config.export = ConfigDict()
    config.export.training_cells = (
        1_000_000  # hashes of the training cells are stored up to this number; 0: none
    )

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
        config.data.update(
            dataset="pbmc68k", cell_encoder="runs/zeromics_sc", max_genes=512, length=192, disease=""
        )
        config.data.vocab_size = 1_024
        config.objective.tasks = (("cell_type", 2.0), ("rare_cell", 1.0))
        config.objective.train_llm = True
        config.optimizer.update(peak_lr=2e-3, warmup_steps=30, final_lr=1e-5, weight_decay=0.1)
        config.train.update(batch_size=16, steps=250, log_every=10, eval_every=50, checkpoint_every=50)
        config.train.update(loader_threads=1, eval_records=0, mesh="data")
        config.builds_on = ConfigDict()  # runs that are trained first if they do not exist
        config.builds_on.cell_model = ConfigDict()
        config.builds_on.cell_model.option = "data.cell_encoder"  # option that names the run
        config.builds_on.cell_model.workdir = "runs/zeromics_sc"
        config.builds_on.cell_model.config = _CELL_MODEL["get_config"]("quickstart")
    return config
