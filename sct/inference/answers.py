"""Annotation by a model that answers in words: the probability of each candidate, for `sct.tl.annotate`."""

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

# Options of `sct.tl.annotate` for any model that answers in words.
OPTIONS = ("layer", "gene_column", "duplicates", "seed", "batch_size", "templates")
LABELS = "labels"
Candidates = Sequence[str] | Sequence[Mapping[str, Any]]


class Annotator(Protocol):
    """Names cells by the answers of a model.

    Attributes
    ----------
    options
        Names of what `annotate` takes beside what is common to all.
    """

    options: tuple[str, ...]

    @property
    def annotate(self) -> Callable[..., ad.AnnData | None]:
        """Write the most probable answer about each cell; takes the cells and the arguments of `sct.tl.annotate`."""
        ...


def candidates_of(
    sentence_model: CellSentenceModel, label_key: str | Sequence[str] | None, given: Candidates | None
) -> tuple[str, list[str]]:
    """Field that is asked for, and the answers to choose among.

    Raises
    ------
    ConfigError
        The model did not learn this label, or has no list of its values and none is given.
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
        advice="choose one of these, or give the names of labels that the model learned together, as a list",
    )
    sentence_model.check(f"cell_to_{field}")
    if isinstance(given, str):
        raise ConfigError(f"candidates is the string {given!r}: give a list of two or more answers.")
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
                f"label_key asks for {', '.join(sorted(keys))}, but the model learned {', '.join(sorted(learned))} "
                "together: ask for these."
            )
    if not found:
        raise ConfigError(
            f"the model has no list of {field}: give candidates=[...], or name one of {', '.join(known) or 'none'}."
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
    """Write the most probable of C answers about each cell, and all probabilities (N, C); see `sct.tl.annotate`.

    The probability that stands in `obs` is that of the answer or, with `asked_for`, that one of these is true.
    """
    best = probabilities.argmax(axis=1)
    highest = probabilities[np.arange(len(best)), best]
    names = np.array(answers, dtype=object)
    labels = np.where(highest >= threshold, names[best], unknown)
    why = "no answer is that probable, so lower the threshold or give other candidates"
    # Cells that are searched for are few, so that one answer for the others is expected.
    warn_of_labels(labels, answers, highest, unknown, why, may_be_alike=asked_for is not None)
    target.obs[key_added] = pd.Categorical(labels)
    told = highest
    if asked_for is not None:
        told = probabilities[:, [answer in asked_for for answer in answers]].sum(axis=1)
    target.obs[f"{key_added}_probability"] = told.astype(np.float32)
    # An array, since names of labels hold what names of columns in a file must not, such as slashes.
    target.obsm[f"{key_added}_probabilities"] = probabilities.astype(np.float32)


class SentenceAnnotator:
    """Names cells by a model of cell sentences, which is asked about each; see `sct.tl.annotate`."""

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
        """Write the most probable answer about each cell; see `sct.tl.annotate`."""
        model, sentence_model = self.model, cell_sentence_model_of(self.model)
        field, answers = candidates_of(sentence_model, label_key, candidates)
        parts = pd.DataFrame([parse_labels(answer) for answer in answers] if field == LABELS else None)
        if "probability" in parts:
            raise ConfigError(
                f"a label is named 'probability', but obs[{key_added}_probability] is that of the answer: train with "
                "another name."
            )
        fields, _ = questions(adata, model, sentence_model, **options)
        logs = sentence_model.score(
            f"cell_to_{field}", fields, answers, templates=templates, batch_size=batch_size
        )
        probabilities = np.exp(logs)
        target = inputs.output_adata(adata, copy)
        write_answers(target, answers, probabilities, key_added, threshold, unknown)
        for key in parts:
            # The probability of a value is that of all combinations with it.
            sums = pd.DataFrame(probabilities).T.groupby(parts[key].to_numpy()).sum().T
            target.obs[f"{key_added}_{key}"] = pd.Categorical(
                sums.columns.to_numpy()[sums.to_numpy().argmax(axis=1)]
            )
        target.uns[key_added] = {
            "sct_version": __version__, "model": repr(model), "weights": model.fingerprint, "label_key": field,
            "labels": answers, "templates": templates, "threshold": threshold,
        }  # fmt: skip
        return target if copy else None
