"""Train a language model on cell sentences: a cell's genes in descending order of expression (Cell2Sentence)."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sct.checks import check_at_least, check_choice, check_not_empty
from sct.data.store import Store, Study
from sct.data.text.cell_sentence import RankFit, fit_rank
from sct.data.text.prompts import TASKS, Prompts, load_prompts, parse_labels, render_labels
from sct.data.text.source import SentenceOptions, SentenceSource, Texts, read_studies
from sct.data.text.tokenizer import VOCAB_SIZE, Tokenizer, train_bpe
from sct.errors import ConfigError
from sct.generation.cell_sentence_model import MAX_LABELS, TASK, CellSentenceModel
from sct.models import lora, registry
from sct.models.adapter_kinds import AdapterConfig
from sct.models.decoder import Decoder
from sct.models.decoder_config import DecoderConfig
from sct.nn.losses import next_token_losses
from sct.tasks.base import (
    DeviceBatch,
    Evaluator,
    MetricSums,
    ObjectiveConfig,
    StoreConfig,
    Variables,
    check_study_names,
    file_option,
    held_out_split,
)
from sct.tasks.task_spec import TaskInputs, TaskSpec

NAME = TASK
_FIT_CELLS = 5000  # cells per study in the fit of expression over log rank


@dataclasses.dataclass(frozen=True)
class SentenceData(StoreConfig):
    """Data options: which cells to train on, and which labels and texts describe them.

    Parameters
    ----------
    top_k
        Largest number of genes in a cell sentence; 0 for all expressed genes.
    length
        Number of tokens in a row. Short texts are packed into one row.
    cell_type, tissue, organism, abstract
        Columns of `obs` with these labels. "" means that there is no such column.
    labels
        Columns of `obs` that describe a cell in combination (cell type, stimulation, exposure, ...). The model predicts
        the combined labels of a cell, or generates cells for them.
    studies
        YAML file with the labels and abstracts of whole studies, in the form `STUDY: {abstract: ..., tissue: ...}`.
    tokenizer
        Tokenizer file or folder. The default is the tokenizer of the model in `init_from`. If `init_from` is not set, a
        tokenizer is trained.
    vocab_size, corpus_cells
        Used only if a tokenizer is trained: the maximum size of the vocabulary, and the number of cells from whose
        texts the tokenizer is trained.
    """

    top_k: int = 100
    length: int = 1024
    cell_type: str = "cell_type"
    tissue: str = ""
    organism: str = ""
    abstract: str = ""
    labels: tuple[str, ...] = ()
    studies: str = file_option()
    tokenizer: str = ""
    vocab_size: int = VOCAB_SIZE
    corpus_cells: int = 20_000

    def __post_init__(self) -> None:
        for name, least in (("top_k", 0), ("length", 8), ("corpus_cells", 1)):
            check_at_least(f"data.{name}", getattr(self, name), least)

    @property
    def text_length(self) -> int:
        """Number of tokens in each row of training text."""
        return self.length


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Options of LoRA adapters on a frozen model; `rank` 0 trains the whole model. See `sct.models.lora.LoraConfig`."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.rank and (self.targets or self.layers or self.dropout or self.alpha != Adapters.alpha):
            raise ConfigError(
                "objective.lora has options, but objective.lora.rank is 0, which trains the whole model: set "
                "objective.lora.rank to 1 or more, or remove the other options of objective.lora."
            )

    def config(self, family: str) -> lora.LoraConfig | None:
        """Return the LoRA options for a model family, or None if the whole model is trained."""
        if not self.rank:
            return None
        own: dict[str, Any] = {"targets": self.targets} if self.targets else {}
        options = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "layers": self.layers}
        return lora.LoraConfig.of(family, **options, **own)


@dataclasses.dataclass(frozen=True)
class CellSentencesConfig(ObjectiveConfig):
    """Options of the objective: tasks, loss, LoRA adapters, and the reports after training.

    Parameters
    ----------
    tasks
        Pairs of (task, sampling weight). The tasks are those of `sct.data.text.prompts.TASKS`.
    loss_on
        Tokens that enter the loss. "response" (only the tokens of the response) is for fine-tuning a pretrained model.
        "all" (also the tokens of the prompt) is for training from random parameters (appendix C).
    balance
        Unit that has equal weight in the loss: "tokens", as in the paper, or "texts". With "texts", the few tokens of a
        label weigh as much as the many tokens of a cell sentence.
    prompts
        JSON file with further prompt templates.
    perturbation, control
        `perturbation` is the entry of `data.labels` that names the treatment of a cell. `control` is the treatment with
        which each of the other treatments is compared. By default, each treatment is compared with the most frequent of
        the other treatments. The report after training then evaluates cells generated for label combinations that are
        not in the training data.
    lora
        Options of LoRA adapters (`sct.models.lora.LoraConfig`), which are trained while the model stays frozen. If
        `targets` is empty, the default targets of the family are used. `rank` 0 trains the whole model.
    report_cells, report_seeds
        Number of held-out cells in the reports after training (0: no reports), and number of random seeds.
    """

    tasks: tuple[tuple[str, float], ...] = (
        ("unconditional", 1.0), ("cell_type_to_cell", 1.0), ("cell_to_cell_type", 1.0),
    )  # fmt: skip
    loss_on: str = "response"
    balance: str = "tokens"
    prompts: str = file_option()
    perturbation: str = ""
    control: str = ""
    lora: Adapters = dataclasses.field(default_factory=lambda: Adapters())
    report_cells: int = 500
    report_seeds: int = 3

    def __post_init__(self) -> None:
        check_choice("loss_on", self.loss_on, ("response", "all"))
        check_choice("balance", self.balance, ("tokens", "texts"))
        for entry in self.tasks:
            if len(entry) != 2 or entry[0] not in TASKS or not float(entry[1]) > 0:
                raise ConfigError(
                    f"objective.tasks has the entry {entry!r}, but each entry must be a pair of a task and a positive "
                    f"weight, such as ({next(iter(TASKS))!r}, 1.0): correct this entry with a task from "
                    f"{', '.join(TASKS)}."
                )
        check_not_empty("objective.tasks", self.tasks)
        check_at_least("report_cells", self.report_cells, 0)
        check_at_least("report_seeds", self.report_seeds, 1)

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters are trained instead of the whole model."""
        return self.lora.rank > 0

    def check_start(self, init_from: str) -> None:
        """Raise `ConfigError` if LoRA is on, but training starts from random parameters."""
        if self.lora.rank and not init_from:
            raise ConfigError(
                "LoRA needs a pretrained model, but --config.init_from is not set: set "
                "--config.init_from=MODEL, or set objective.lora.rank to 0."
            )


def options_of(config: CellSentencesConfig, data: SentenceData, seed: int) -> SentenceOptions:
    """Combine a configuration's objective and data sections into the options that turn cells into texts."""
    columns = {name: getattr(data, name) for name in ("cell_type", "tissue", "organism", "abstract")}
    return SentenceOptions(
        top_k=data.top_k,
        length=data.length,
        tasks=tuple((name, float(weight)) for name, weight in config.tasks),
        fields={name: column for name, column in columns.items() if column},
        labels=tuple(data.labels),
        studies=read_studies(data.studies) if data.studies else {},
        all_tokens=config.loss_on == "all",
        seed=seed,
    )


def corpus(
    studies: Sequence[Study], store: Store, options: SentenceOptions, prompts: Prompts, cells: int
) -> Iterator[str]:
    """Yield texts for training a tokenizer, from approximately `cells` cells. Larger studies give more cells."""
    total = sum(study.n_cells for study in studies)
    for study in studies:
        texts = Texts(study, store.vocabulary, options, prompts)
        wanted = min(study.n_cells, max(1, round(cells * study.n_cells / total)))
        for start in range(0, wanted, 512):
            for example in texts.examples(start, min(start + 512, wanted), 0):
                yield example.text


def make_tokenizer(store: Store, config: CellSentencesConfig, data: SentenceData, seed: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on cell sentences in their prompts (appendix C.0.1)."""
    prompts = load_prompts(config.prompts or None)
    texts = corpus(store.split("train"), store, options_of(config, data, seed), prompts, data.corpus_cells)
    return train_bpe(texts, data.vocab_size)


class CellSentences:
    """Task of Cell2Sentence; see `sct.tasks.base.Task`.

    Parameters
    ----------
    config, data
        Options of the objective and of the data.
    model
        Configuration of the architecture. Its vocabulary must be at least as large as the tokenizer's.
    tokenizer
        Tokenizer of the texts.
    store
        Store with the cells.
    seed
        Seed that draws tasks and templates.
    family
        Name of the architecture, which sets the default targets of LoRA.
    """

    license = "unknown"
    loss_normalizer = "weight"
    monitor, monitor_mode = "loss", "min"

    def __init__(
        self,
        config: CellSentencesConfig,
        data: SentenceData,
        model: DecoderConfig,
        tokenizer: Tokenizer,
        store: Store,
        seed: int,
        family: str = "gpt2",
    ):
        if model.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens: set "
                "model.vocab_size to 0 to use the number of tokens of the tokenizer."
            )
        if model.positions == "learned" and data.length > model.max_length:
            raise ConfigError(
                f"data.length is {data.length} tokens, but the model has only {model.max_length} positions: "
                f"set data.length to {model.max_length} or less, or raise model.max_length if you train from "
                "random parameters."
            )
        if config.perturbation:
            check_choice(
                "objective.perturbation", config.perturbation, data.labels, advice="name one of data.labels"
            )
        self.config, self.data, self.model_config, self.store = config, data, model, store
        self.options = options_of(config, data, seed)
        check_study_names(self.options.studies, store, data.studies)
        self.tokenizer, self.vocabulary = tokenizer, store.vocabulary
        self.model, self.prompts = Decoder(model), load_prompts(config.prompts or None)
        self.tokens_per_record = data.length
        self.lora: AdapterConfig | None = config.lora.config(family)
        self.trainable: Sequence[tuple[str, bool]] = lora.TRAINABLE if self.lora else ((".*", True),)
        self.may_be_missing: Sequence[str] = lora.NEW if self.lora else ()

    def take_pretrained_params(self) -> Mapping[str, Any]:
        """Return no arrays, because all parameters start from random values."""
        return {}

    def init(self, rng: jax.Array) -> Variables:
        """Return the initial variables, boxed with their logical axis names."""
        variables = cast(Variables, self.model.init(rng, *Decoder.example(self.model_config).values()))
        if self.lora is None:
            return variables
        return {
            **variables,
            "adapters": lora.init(jax.random.fold_in(rng, 1), variables["params"], self.lora),
        }

    def loss(
        self, variables: Variables, batch: DeviceBatch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, MetricSums]:
        """Return the mean cross-entropy of the predicted tokens, balanced by tokens or by texts.

        Also returns sums over the batch. `loss` is the unbalanced loss, summed over the predicted tokens. `predicted`
        is the number of these tokens, and `right` is the number of correct ones. The balanced loss is `weighted`
        divided by `weight`. `cut` is the number of tokens that did not fit into the rows.
        """
        ids, segments = batch["input_ids"], batch["segments"]
        drops = self.model_config.dropout or (isinstance(self.lora, lora.LoraConfig) and self.lora.dropout)
        rngs = {"dropout": rng} if train and drops else {}
        # In a row of one text, causal attention never reads the padding. Without segments, attention is fastest.
        seen = None if self.alone else segments
        hidden = self.model.apply(variables, ids, segments=seen, rngs=rngs, method="hidden_states")

        def scores(x: jax.Array) -> jax.Array:
            return cast(jax.Array, self.model.apply(variables, x, method="logits"))

        losses, right, counts = next_token_losses(
            scores,
            cast(jax.Array, hidden),
            ids,
            batch["predicted"],
            batch["example_mask"],
            self.model_config.vocab_size,
        )
        weights = counts
        if self.config.balance == "texts":
            weights = counts / jnp.maximum(_per_text(counts, segments), 1.0)
        total, count = (losses * weights).sum(), weights.sum()
        sums = {
            "loss": (losses * counts).sum(),
            "weight": count,
            "weighted": total,
            "predicted": counts.sum(),
            "right": (right * counts).sum(),
            "cut": (batch["cut"] * (batch["example_mask"] > 0)).sum().astype(jnp.float32),
        }
        return total / jnp.maximum(count, 1.0), sums

    @functools.cached_property
    def alone(self) -> bool:
        """Whether each row holds only one text, both in the training data and in the validation data."""
        sources = [self.dataset(split) for split in ("train", "validation")]
        return all(source.cells_per_row == 1 for source in sources if source is not None)

    def compute_metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the balanced mean loss in nats, the token perplexity and accuracy, and the fraction of cut tokens."""
        count, cut = max(float(sums["predicted"]), 1.0), float(sums["cut"])
        loss = float(sums["weighted"]) / max(float(sums["weight"]), 1e-9)
        summary = {
            "loss": loss,
            "perplexity": float(np.exp(min(float(sums["loss"]) / count, 700.0))),
            "accuracy": float(sums["right"]) / count,
        }
        return {**summary, "cut": cut / (cut + count)} if cut else summary

    @functools.cache  # noqa: B019 (a run has one task)
    def dataset(self, split: str) -> SentenceSource | None:
        """Return the rows of text of a split.

        Return None if the split has no studies. For a split other than "train", also return None if the cells lack the
        labels that the tasks need.
        """
        studies = self.store.split(split)
        if not studies:
            return None
        needs = split == "train"
        source = SentenceSource(studies, self.vocabulary, self.options, self.prompts, self.tokenizer, needs)
        return source if needs or source.possible else None

    def evaluators(self) -> Sequence[Evaluator]:
        """Return the evaluations of labels, generated cells and texts.

        The evaluations use the test studies, or the validation studies if there are no test studies.
        """
        held_out, note = held_out_split(self.store)
        if held_out is None or not self.config.report_cells:
            return ()
        from sct.tasks.sentence_reports import Contrast, reports

        train, after = (
            [Texts(study, self.vocabulary, self.options, self.prompts) for study in self.store.split(split)]
            for split in ("train", held_out)
        )
        tasks = [name for name, _ in self.options.tasks]
        config, contrast = self.config, None
        if config.perturbation:
            seen = frozenset(self._label_counts.get("labels", ()))
            values = {parse_labels(name)[config.perturbation] for name in seen}
            if config.control:
                check_choice(
                    "objective.control",
                    config.control,
                    sorted(values),
                    advice=f"set it to a value of {config.perturbation} in the training cells",
                )
            contrast = Contrast(config.perturbation, config.control, seen)
        options = (tasks, config.report_cells, config.report_seeds, note, contrast)
        return list(reports(self._writer, train, after, *options))

    def _writer(self, variables: Variables) -> CellSentenceModel:
        """Return a `CellSentenceModel` that uses the given variables."""
        parts = self.exports()
        return CellSentenceModel.of(
            self.model_config, variables, parts["tokenizer"], parts["genes"], parts["data"]
        )

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of tokens in a batch, including padding."""
        return int(np.prod(batch["input_ids"].shape))

    @functools.cached_property
    def fits(self) -> dict[str, RankFit]:
        """Linear fits of expression against log rank: one per training study, and one for all studies ("all")."""
        parts, found = [], {}
        for study in self.store.split("train"):
            counts = study.read(0, min(study.n_cells, _FIT_CELLS))
            parts.append(counts[: max(1, _FIT_CELLS // len(self.store.split("train")))])
            found[study.name] = fit_rank(counts, top_k=self.data.top_k or None)
        return {"all": fit_rank(sparse.vstack(parts, format="csr"), top_k=self.data.top_k or None), **found}

    @functools.cached_property
    def _label_counts(self) -> dict[str, Counter[str]]:
        """For each label column, count the training cells with each value. The key "labels" counts combined labels."""
        found: dict[str, Counter[str]] = {}
        for study in self.store.split("train"):
            obs = study.obs({*self.options.fields.values(), *self.options.labels})
            for field in ("cell_type", "tissue", "organism"):
                column = self.options.fields.get(field)
                known: list[str] = []
                if column in obs:
                    values = obs[column][obs[column].notna()].astype(str).str.strip()
                    known = values[values != ""].tolist()
                found.setdefault(field, Counter()).update(known)
                # Cells without a value in `obs` get the value of their study.
                text = self.options.studies.get(study.name, {}).get(field)
                if text and len(known) < study.n_cells:
                    found[field][text] += study.n_cells - len(known)
            names = list(self.options.labels)
            if names and set(names) <= set(obs.columns):
                full = obs[names].dropna().astype(str).apply(lambda column: column.str.strip())
                full = full[(full != "").all(axis=1)]
                rows, sizes = full.drop_duplicates().to_dict("records"), full.value_counts()
                combined = {
                    render_labels(row): int(sizes[tuple(row[name] for name in names)]) for row in rows
                }
                found.setdefault("labels", Counter()).update(combined)
        return found

    def labels(self) -> dict[str, list[str]]:
        """Return the values that each label has in the training cells, the most frequent value first.

        The key "labels" holds the combined labels.
        """
        return {
            field: sorted(counts, key=lambda value, counts=counts: (-counts[value], value))  # type: ignore[misc]
            for field, counts in self._label_counts.items()
            if 0 < len(counts) <= MAX_LABELS
        }

    def operations(self, records: int) -> float:
        """Return the FLOPs of the matrix products in one forward pass. A multiply-add counts as 2 FLOPs."""
        return Decoder.flops(self.model_config, records, self.data.length)

    def exports(self) -> dict[str, Any]:
        """Return the genes, the tokenizer, and the options with which cells become training texts."""
        described = {
            "task": NAME,
            "tasks": [name for name, _ in self.options.tasks],
            "top_k": self.data.top_k,
            "length": self.data.length,
            "fits": {name: dataclasses.asdict(fit) for name, fit in self.fits.items()},
            "labels": self.labels(),
            "prompts": self.prompts.plain(),
        }
        return {"genes": self.vocabulary, "tokenizer": self.tokenizer, "data": described}

    def notes(self, fresh: bool) -> Sequence[str]:
        """Return notices on the fit of expression against rank, on the packing of texts, and on a new model's loss."""
        fit, source = self.fits["all"], self.dataset("train")
        rows = 0 if source is None else source.cells_per_row
        many = "1 cell" if rows == 1 else f"{rows} cells"
        return (
            f"expression = {fit.slope:.3f} ln(rank) + {fit.intercept:.3f}: R2 {fit.r2:.2f}, Pearson {fit.pearson:.2f}, "
            f"Spearman {fit.spearman:.2f}; vocabulary of {self.tokenizer.vocab_size:,} tokens, {many} in each row of "
            f"{self.data.length:,} tokens.",
            *(
                [
                    "the model starts from random parameters, but the loss covers only responses: set "
                    "--config.init_from=MODEL to start from a pretrained model, or use the variant :scratch, whose "
                    "loss covers all tokens."
                ]
                if fresh and self.config.loss_on == "response"
                else []
            ),
        )


def _per_text(counts: jax.Array, segments: jax.Array) -> jax.Array:
    """Sum per-token counts (B, T) over each packed text, and return for every token the sum of its text."""
    texts = segments.shape[1] + 1

    def of_row(counts: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(counts, segments, texts)[segments]

    return jax.vmap(of_row)(counts, segments)


def make(inputs: TaskInputs) -> CellSentences:
    """Build the task from `TaskInputs`, which hold the sections of a configuration."""
    assert inputs.tokenizer is not None
    model = registry.model_config(inputs.architecture, inputs.model, inputs.tokenizer.vocab_size)
    return CellSentences(
        inputs.objective, inputs.data, model, inputs.tokenizer, inputs.store, inputs.seed, inputs.architecture
    )


SPEC = TaskSpec(
    NAME, CellSentencesConfig, SentenceData, make, make_tokenizer, inherits_architecture=True, speed=()
)
