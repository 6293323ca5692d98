"""Cell2Sentence with GPT-2: cells as sentences of their 100 most highly expressed genes, generated and named.

Tuning of GPT-2 small (124 million parameters) from a Hugging Face folder with `config.json`, `model.safetensors` and
`tokenizer.json`; the loss counts the responses alone (paper, appendix C.0.2):

    python -m launch.train --config=configs/c2s_gpt2.py --config.init_from=GPT2_FOLDER --config.data.store=STORE \
        --workdir=runs/c2s

    Any size (medium, large) does: the architecture is that of the folder. Hardware: one GPU (its memory was not
    measured; --config.train.accumulate=8 runs a batch in parts).

:scratch, from random parameters with a tokenizer of its own; the loss counts all tokens (appendix C.0.1):

    python -m launch.train --config=configs/c2s_gpt2.py:scratch --config.data.store=STORE --workdir=runs/c2s

:quickstart, a small GPT-2 from random parameters on real blood cells that come with scanpy, a few minutes on 2 CPU
cores (README.md, "Results"):

    python -m launch.train --config=configs/c2s_gpt2.py:quickstart --workdir=runs/c2s_quickstart
"""

from ml_collections import ConfigDict

VARIANTS = ("", "scratch", "quickstart")


def get_config(variant: str = "") -> ConfigDict:
    """The paper's recipe, or a small variant of it."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS[1:])}")
    config = ConfigDict()
    config.family = "gpt2"
    config.task = "cell_sentences"
    config.init_from = ""  # Hugging Face folder, model folder or run; its architecture replaces that below

    config.model = ConfigDict()
    config.model.vocab_size = 0  # 0: the tokenizer's
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
    config.data.top_k = 100
    config.data.length = 1024
    config.data.cell_type = "cell_type"  # columns of obs, "" for none
    config.data.tissue = ""
    config.data.organism = ""
    config.data.abstract = ""
    config.data.labels = ()
    config.data.studies = ""  # YAML file with texts of whole studies
    config.data.tokenizer = ""  # folder; otherwise that of init_from, or a new one
    config.data.vocab_size = 9_609
    config.data.corpus_cells = 20_000

    config.objective = ConfigDict()
    config.objective.tasks = (("unconditional", 1.0), ("cell_type_to_cell", 1.0), ("cell_to_cell_type", 1.0))
    config.objective.loss_on = "response"
    config.objective.balance = "tokens"  # texts: a label counts as much as a whole sentence
    config.objective.prompts = ""  # JSON file with further templates
    config.objective.perturbation = ""  # of data.labels: unseen combinations are measured beside those with
    config.objective.control = ""  # this value of it; empty: the most frequent other one
    config.objective.lora = ConfigDict()
    config.objective.lora.rank = 0  # above 0: low-rank adapters alone are trained
    config.objective.lora.alpha = 16.0
    config.objective.lora.dropout = 0.0
    config.objective.lora.targets = ()  # regular expressions over paths; empty: those of the family
    config.objective.lora.layers = ()  # numbers of blocks, counted from 0; empty: all
    config.objective.report_cells = 500
    config.objective.report_seeds = 3

    config.adapters = ConfigDict()  # trained in place of the model of init_from
    config.adapters.kind = ""  # low_rank (LoRA), bottleneck or prefix; empty: the model itself is trained
    config.adapters.targets = ()  # regular expressions over paths of layers; empty: those of the architecture
    config.adapters.layers = ()  # numbers of blocks, counted from 0; empty: all
    config.adapters.update(rank=8, alpha=16.0)  # of low_rank
    config.adapters.update(width=128, scale=1.0, skip=True)  # of bottleneck
    config.adapters.length = 64  # of prefix

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
    config.train.batch_size = 32  # rows of data.length tokens, about four cells each: 128 examples
    config.train.accumulate = 1
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

    if variant in ("scratch", "quickstart"):
        config.objective.loss_on = "all"
    if variant == "quickstart":
        config.model.remat = "none"
        config.model.update(
            embed_dim=192, num_layers=4, num_heads=6, ffn_dim=768, max_length=512, dtype="float32"
        )
        config.data.update(dataset="pbmc68k", length=512)
        config.objective.balance = "texts"  # departs from the paper: few cells, and labels are learned sooner
        config.optimizer.update(peak_lr=2e-3, warmup_steps=30, final_lr=1e-4)
        config.train.update(batch_size=8, steps=600, log_every=20, eval_every=100, checkpoint_every=100)
        config.train.update(loader_threads=1, eval_records=0)
    return config
