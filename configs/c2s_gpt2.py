"""Train Cell2Sentence with GPT-2, to generate cells and to predict the labels of cells.

A cell is written as a cell sentence: the names of the 100 most highly expressed genes, from the highest to the lowest
count.

This command fine-tunes GPT-2 small (124 million parameters) from a Hugging Face folder. The folder must contain
`config.json`, `model.safetensors` and `tokenizer.json`. The loss covers only the responses (paper, appendix C.0.2):

    python -m launch.train --config=configs/c2s_gpt2.py --config.init_from=GPT2_FOLDER --config.data.store=STORE \
        --workdir=runs/c2s

    The Hugging Face folder determines the architecture, so other sizes of GPT-2 (medium, large) also work. Hardware:
    one GPU (the memory use was not measured). To use less memory, set --config.train.grad_accum_steps=8.

:scratch trains from random initialization with a new tokenizer. The loss covers all tokens (appendix C.0.1):

    python -m launch.train --config=configs/c2s_gpt2.py:scratch --config.data.store=STORE --workdir=runs/c2s

:quickstart trains a small GPT-2 from random initialization on real blood cells from scanpy, in a few minutes on 2 CPU
cores. For the expected results, see README.md, "Results":

    python -m launch.train --config=configs/c2s_gpt2.py:quickstart --workdir=runs/c2s_quickstart
"""

from ml_collections import ConfigDict

VARIANTS = ("", "scratch", "quickstart")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the paper's recipe, or of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.family = "gpt2"
    config.task = "cell_sentences"
    config.init_from = ""  # Hugging Face folder, model folder or run folder; replaces config.model

    config.model = ConfigDict()
    config.model.vocab_size = 0  # 0: size of the tokenizer
    config.model.embed_dim = 768
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.ffn_dim = 3072
    config.model.max_length = 1024
    config.model.dropout = 0.1
    config.model.init = "xavier"
    config.model.remat = "level"
    config.model.dtype = "bfloat16"

    config.data = ConfigDict()
    config.data.store = ""
    config.data.dataset = ""
    config.data.tokens = 0.0
    config.data.top_k = 100  # number of genes in a cell sentence; 0: all expressed genes
    config.data.length = 1024  # tokens per row
    config.data.cell_type = "cell_type"  # this and the next three: columns of obs; "": none
    config.data.tissue = ""
    config.data.organism = ""
    config.data.abstract = ""
    config.data.labels = ()  # columns of obs that are predicted together
    config.data.studies = ""  # YAML file with study metadata
    config.data.tokenizer = ""  # folder; empty: the tokenizer of init_from, or a newly trained tokenizer
    config.data.vocab_size = 9_609
    config.data.corpus_cells = 20_000  # cells on which a new tokenizer is trained

    config.objective = ConfigDict()
    config.objective.tasks = (("unconditional", 1.0), ("cell_type_to_cell", 1.0), ("cell_to_cell_type", 1.0))
    config.objective.loss_on = "response"  # or all: loss over all tokens
    config.objective.balance = "tokens"  # or texts: a label has the same weight as a cell sentence
    config.objective.prompts = ""  # JSON file with more templates
    # One of data.labels: the report evaluates label combinations that no training cell has.
    config.objective.perturbation = ""
    config.objective.control = ""  # unperturbed value of this label; empty: the most frequent other value
    config.objective.lora = ConfigDict()
    config.objective.lora.rank = 0  # above 0: train only low-rank adapters
    config.objective.lora.alpha = 16.0
    config.objective.lora.dropout = 0.0
    config.objective.lora.targets = ()  # regular expressions over layer paths; empty: default of the family
    config.objective.lora.layers = ()  # block numbers, counted from 0; empty: all
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
    config.optimizer.peak_lr = 6e-4
    config.optimizer.init_lr = 0.0
    config.optimizer.final_lr = 0.0
    config.optimizer.warmup_steps = 500
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.optimizer.moment_dtype = "float32"

    config.train = ConfigDict()
    config.train.steps = 50_000
    config.train.batch_size = 32  # rows of data.length tokens, with about four cells each: 128 cells
    config.train.grad_accum_steps = 1
    config.train.batch_ramp = ()
    config.train.log_every = 100
    config.train.eval_every = 1_000
    config.train.eval_records = 500
    config.train.checkpoint_every = 1_000
    config.train.keep_last = 2
    config.train.patience = 10
    config.train.stop_at = 0
    config.train.seed = 0
    config.train.loader_threads = 4
    config.train.mesh = "data"  # or single, fsdp, pod, or sizes: data=2,fsdp=4

    config.export = ConfigDict()
    config.export.training_cells = (
        1_000_000  # hashes of the training cells are stored up to this number; 0: none
    )

    if variant in ("scratch", "quickstart"):
        config.objective.loss_on = "all"
    if variant == "quickstart":
        config.model.remat = "none"
        config.model.update(
            embed_dim=192, num_layers=4, num_heads=6, ffn_dim=768, max_length=512, dtype="float32"
        )
        config.data.update(dataset="pbmc68k", length=512)
        config.objective.balance = "texts"  # not in the paper: with few cells, labels are learned faster
        config.optimizer.update(peak_lr=2e-3, warmup_steps=30, final_lr=1e-4)
        config.train.update(batch_size=8, steps=600, log_every=20, eval_every=100, checkpoint_every=100)
        config.train.update(loader_threads=1, eval_records=0)
    return config
