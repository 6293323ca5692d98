"""Fine-tune a pretrained model for cell types, with the methods and the protocol of the scPEFT paper.

The store needs a column with labels. 80% of the donors are used for training, one of which is the validation donor, and
the other donors are the test. If the store has no column `donor`, cells are divided at random within each type. If the
store has test studies, the studies decide the split. --config.data.split_key names a column with the values train,
validation and test.

    python -m launch.ingest --input=FILES --output=STORE --genes=MODEL/genes.tsv
    python -m launch.train --config=configs/peft_annotation.py --config.init_from=MODEL --config.data.store=STORE \
        --config.peft.method=gene_encoder --workdir=runs/tuned

--config.family is the architecture of the model. Trained parameters at the size of the published whole-human model
(width 512, 12 layers) with 11 types:

    full               all  all parameters of the model
    classifier     533,003  two times (dense layer, ReLU, layer norm), and a dense layer
    gene_token     664,715  a bottleneck of width 128 after the gene embedding
    prefix         926,219  64 vectors in each of 12 attention layers
    lora         1,270,283  rank 20 on queries, keys and values of 12 layers
    gene_encoder 2,113,547  two bottlenecks of width 128 in each of the layers 6 to 11

All methods train the classifier; all but full leave the weights of the model as they are. The paper's bottleneck has no
skip connection: --config.peft.skip=False. The optimizer is that of the paper: Adam with a learning rate of 1e-5, which
is halved when the training loss stops falling, at most 100 epochs, and the checkpoint with the lowest validation loss.

:quickstart pretrains a small cell encoder on real blood cells from scanpy (configs/scgpt_pretrain.py:quickstart, unless
it is trained already), and fine-tunes it for the 10 cell types of these cells, for at most 15 epochs of 490 cells. On 2
CPU cores, it took 2 minutes, pretraining included. On 140 test cells, it reached an accuracy of 0.72 and a macro F1 of
0.41 on one processor, and 0.65 and 0.37 on another one: training on so few cells depends on rounding. On the same
cells, logistic regression reached 0.79 and 0.68 on principal components, and 0.84 and 0.73 on scaled counts, and 15
nearest neighbors of principal components 0.80 and 0.62; the native model reached 0.39 and 0.16, and 0.38 and 0.19. The
encoder has learned little from 490 cells, so the quick start trains all parameters (full). The notebook
06_finetune.ipynb compares the methods:

    python -m launch.train --config=configs/peft_annotation.py:quickstart --workdir=runs/peft
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

VARIANTS = ("", "quickstart")
_CELL_MODEL = runpy.run_path(str(Path(__file__).with_name("scgpt_pretrain.py")))


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration of the paper's protocol, or of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS[1:])}.")
    config = ConfigDict()
    config.family = "scgpt"  # architecture of init_from
    config.task = "annotation"
    config.init_from = ""  # model to fine-tune: run folder, model folder or Hub id

    config.model = ConfigDict()  # sizes come from init_from
    config.model.dtype = "bfloat16"
    config.model.remat = "level"

    config.data = ConfigDict()
    config.data.store = ""
    config.data.dataset = ""
    config.data.tokens = 0.0
    config.data.label_key = "cell_type"  # column of obs with the labels
    config.data.split_key = ""  # column of obs with the values train, validation and test
    config.data.donor_key = "donor"  # column of obs with the donors
    config.data.test_fraction = 0.2  # share of the donors, or of the cells
    config.data.split_seed = 0
    config.data.cells_per_bag = 0  # 0: as in the training of the model

    config.peft = ConfigDict()
    # full, classifier, prefix, lora, gene_token, gene_encoder, or several with adapters: lora+gene_token
    config.peft.method = "gene_encoder"
    config.peft.update(rank=20, alpha=20.0)  # options of lora
    config.peft.length = 64  # option of prefix
    config.peft.update(width=128, scale=1.0, skip=True)  # options of gene_token and gene_encoder
    config.peft.layers = ()  # block numbers, counted from 0; empty: upper half for gene_encoder, otherwise all

    config.objective = ConfigDict()
    config.objective.class_weights = "none"  # or balanced
    config.objective.report_native = True
    config.objective.report_baselines = True

    config.optimizer = ConfigDict()
    config.optimizer.peak_lr = 1e-5
    config.optimizer.init_lr = 1e-5
    config.optimizer.warmup_steps = 0
    config.optimizer.schedule = "plateau"
    config.optimizer.plateau_factor = 0.5
    config.optimizer.plateau_patience = 3  # epochs
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0
    config.optimizer.moment_dtype = "float32"

    config.train = ConfigDict()
    config.train.steps = 0
    config.train.epochs = 100
    config.train.batch_size = 32
    config.train.grad_accum_steps = 1
    config.train.log_every = 0  # 0: once per epoch
    config.train.eval_every = 0
    config.train.checkpoint_every = 0
    config.train.eval_records = 0
    config.train.keep_last = 1
    config.train.patience = 10  # epochs
    config.train.stop_at = 0
    config.train.seed = 0
    config.train.loader_threads = 8
    config.train.mesh = "data"  # or single, fsdp, pod, or sizes: data=2,fsdp=4

    if variant == "quickstart":
        config.init_from = "runs/scgpt"
        config.model.update(dtype="float32", remat="none")
        config.data.update(dataset="pbmc68k")
        config.peft.update(method="full", width=32)  # see above
        config.optimizer.update(peak_lr=1e-3, init_lr=1e-3)
        config.train.update(epochs=15, batch_size=16, loader_threads=1, patience=6)
        config.builds_on = ConfigDict()  # runs that are trained first if they do not exist
        config.builds_on.base = ConfigDict()
        config.builds_on.base.option = "init_from"  # option that names the run
        config.builds_on.base.workdir = "runs/scgpt"
        config.builds_on.base.config = _CELL_MODEL["get_config"]("quickstart")
    return config
