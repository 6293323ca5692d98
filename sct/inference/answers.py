"""Annotate cells with a language model, by scoring the candidate labels (for `sct.tl.annotate`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import anndata as ad
import numpy as np
import pandas as pd

from sct.checks import check_choice, check_distinct, check_not_empty
from sct.data.text.prompts import parse_labels, render_labels
from sct.errors import ConfigError
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.inference import inputs
from sct.inference.labels import warn_of_labels
from sct.inference.sentences import cell_sentence_model_of, questions
from sct.version import __version__
from sct.weights.pretrained import Pretrained

# Options of `sct.tl.annotate` that every language model accepts.
OPTIONS = ("layer", "gene_column", "duplicates", "seed", "batch_size", "templates")
LABELS = "labels"
Candidates = Sequence[str] | Sequence[Mapping[str, Any]]


class Annotator(Protocol):
    """Interface of objects that predict cell labels with a language model.

    Attributes
    ----------
    options
        Names of the optional arguments of `annotate` that this model accepts.
    """

    options: tuple[str, ...]

    @property
    def annotate(self) -> Callable[..., ad.AnnData | None]:
        """Write the most probable label of each cell to an AnnData. The arguments are those of `sct.tl.annotate`."""
        ...


def candidates_of(
    sentence_model: CellSentenceModel, label_key: str | Sequence[str] | None, given: Candidates | None
) -> tuple[str, list[str]]:
    """Return the prompt field to predict ("cell_type", "tissue" or "labels"), and the candidate labels.

    Raises
    ------
    ConfigError
        The model was not trained to predict this label, or `given` is missing and the model does not store the possible
        labels.
    """
    known = [name for name in ("cell_type", "tissue", LABELS) if f"cell_to_{name}" in sentence_model.tasks]
    if label_key is None:
        label_key = known[0] if known else "cell_type"
    alone = isinstance(label_key, str) and label_key != LABELS
    field = str(label_key) if alone else LABELS
    check_choice(
        "label_key",
        field,
        ("cell_type", "tissue", LABELS),
        advice="choose one of these, or pass a list of the labels that the model predicts in combination",
    )
    sentence_model.check(f"cell_to_{field}")
    if isinstance(given, str):
        raise ConfigError(
            f"`candidates` is the string {given!r}, but it must be a list: pass a list of two or more labels."
        )
    if given is not None:
        texts = [render_labels(each) if isinstance(each, Mapping) else str(each) for each in given]
        check_not_empty("candidates", texts, least=2)
        check_distinct("candidates", texts)
        return field, texts
    found = list(sentence_model.labels.get(field, ()))
    if field == LABELS and found:
        keys = {label_key} if isinstance(label_key, str) else set(label_key)
        learned = set(parse_labels(found[0]))
        if keys != learned and keys != {LABELS}:
            raise ConfigError(
                f"label_key is {', '.join(sorted(keys))}, but the model predicts the labels "
                f"{', '.join(sorted(learned))} together: set label_key to {sorted(learned)!r}."
            )
    if not found:
        other = f", or set label_key to {' or '.join(known)}" if known else ""
        raise ConfigError(
            f"the model stores no list of {field} values to choose from: pass candidates=[...]{other}."
        )
    return field, found


def write_answers(
    target: ad.AnnData,
    answers: Sequence[str],
    probabilities: np.ndarray,
    key_added: str,
    threshold: float = 0.0,
    unknown: str = "",
    asked_for: Collection[str] | None = None,
) -> None:
    """Write the most probable answer of each cell and the probabilities (N, C) of all C answers.

    The results have the names that `sct.tl.annotate` documents.

    By default, `obs` gets the probability of the most probable answer. If `asked_for` is given, `obs` gets the summed
    probability of the answers in `asked_for` instead.
    """
    best = probabilities.argmax(axis=1)
    highest = probabilities[np.arange(len(best)), best]
    names = np.array(answers, dtype=object)
    labels = np.where(highest >= threshold, names[best], unknown)
    why = "no candidate reaches the threshold, so lower the threshold or pass other candidates"
    # In a search for rare cells, nearly all cells are expected to have the same answer.
    warn_of_labels(labels, answers, highest, unknown, why, may_be_alike=asked_for is not None)
    target.obs[key_added] = pd.Categorical(labels)
    probability = highest
    if asked_for is not None:
        probability = probabilities[:, [answer in asked_for for answer in answers]].sum(axis=1)
    target.obs[f"{key_added}_probability"] = probability.astype(np.float32)
    # Write an array, not a table: labels may contain slashes, which h5ad does not allow in column names.
    target.obsm[f"{key_added}_probabilities"] = probabilities.astype(np.float32)


class SentenceAnnotator:
    """Annotator that predicts labels with a cell-sentence model; see `sct.tl.annotate`."""

    options: tuple[str, ...] = OPTIONS

    def __init__(self, model: Pretrained):
        self.model = model

    def annotate(
        self,
        adata: ad.AnnData,
        *,
        label_key: str | Sequence[str] | None,
        candidates: Candidates | None,
        threshold: float,
        unknown: str,
        key_added: str,
        copy: bool,
        templates: int = 1,
        batch_size: int = 8,
        **options: Any,
    ) -> ad.AnnData | None:
        """Score the candidate labels and write the most probable label of each cell; see `sct.tl.annotate`."""
        model, sentence_model = self.model, cell_sentence_model_of(self.model)
        field, answers = candidates_of(sentence_model, label_key, candidates)
        parts = pd.DataFrame([parse_labels(answer) for answer in answers] if field == LABELS else None)
        if "probability" in parts:
            raise ConfigError(
                f"the model predicts a label named 'probability', but obs[{key_added}_probability] is the column for "
                "probabilities: rename the label in the training data and train again."
            )
        fields, _ = questions(adata, model, sentence_model, **options)
        logs = sentence_model.score(
            f"cell_to_{field}", fields, answers, templates=templates, batch_size=batch_size
        )
        probabilities = np.exp(logs)
        target = inputs.output_adata(adata, copy)
        write_answers(target, answers, probabilities, key_added, threshold, unknown)
        for key in parts:
            # The probability of a value is the sum over all combinations that contain it.
            sums = pd.DataFrame(probabilities).T.groupby(parts[key].to_numpy()).sum().T
            target.obs[f"{key_added}_{key}"] = pd.Categorical(
                sums.columns.to_numpy()[sums.to_numpy().argmax(axis=1)]
            )
        target.uns[key_added] = {
            "sct_version": __version__, "model": repr(model), "weights": model.fingerprint, "label_key": field,
            "labels": answers, "templates": templates, "threshold": threshold,
        }  # fmt: skip
        return target if copy else None
