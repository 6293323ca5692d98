"""Answer questions about the cells of an AnnData with an instruction-tuned model (ZerOmics, section 3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct.checks import check_at_least, check_text
from sct.data.cells import CellCounts
from sct.data.counts import COUNTS, Values
from sct.data.text.prompts import task_name
from sct.errors import ConfigError
from sct.generation.instruction_model import CellBins, InstructionModel
from sct.inference import binned_cells, inputs
from sct.inference.answers import OPTIONS, write_answers
from sct.version import __version__
from sct.weights.pretrained import Pretrained


def instruction_model_of(model: Pretrained) -> InstructionModel:
    """Return the `InstructionModel` of a loaded model; raise `ConfigError` if the model was not instruction-tuned."""
    return InstructionModel.of(model.config, model.variables, model.tokenizer, model.genes, model.data)


def check_key(name: str) -> None:
    """Raise `ConfigError` if `key_added` is not a non-empty string."""
    check_text("key_added", name, advice="set it to the name of a column of obs")


def study_metadata_of(adata: ad.AnnData, name: str, given: Any, form: str, argument: str = "") -> Any:
    """Return study metadata: the value `given` or, if this is None, the value in `adata.uns[name]`.

    Parameters
    ----------
    adata
        Cells.
    name
        Key of the metadata in `uns`.
    given
        Value that the user passed; None if the value comes from `uns`.
    form
        Expected form, for messages: "a text", or a list such as "a list of names".
    argument
        Name of the user's argument, for messages; by default `name`.

    Raises
    ------
    ConfigError
        The value is missing or does not have the expected form.
    """
    argument = argument or name
    found = adata.uns.get(name) if given is None else given
    where = f'adata.uns["{name}"]' if given is None else argument
    if found is None:
        raise ConfigError(
            f'{argument} is missing, but must be {form}: pass {argument}=... or set adata.uns["{name}"].'
        )
    if form == "a text":
        check_text(where, found)
        return found
    many = isinstance(found, Iterable) and not isinstance(found, str)
    names = list(found) if many else []
    if wrong := [each for each in names if not isinstance(each, str) or not each.strip()]:
        raise ConfigError(
            f"{where} contains {wrong[0]!r}, but every entry must be a non-empty string: correct this entry."
        )
    if not names:
        raise ConfigError(f'{where} is {found!r}, but must be {form}: write a list like ["one", "two"].')
    return [str(each) for each in names]


def blocks_of(
    adata: ad.AnnData, model: Pretrained, instruction_model: InstructionModel, options: dict[str, Any]
) -> Iterator[tuple[CellBins, list[int]]]:
    """Yield blocks of a few thousand cells, each as (model inputs, keys of the cells)."""
    table = CellCounts(adata, model.vocabulary, **options)
    inputs.check_counted(table)
    for records, rows in binned_cells.blocks(table, instruction_model.cells, instruction_model.known):
        yield records, [int(key) for key in table.keys[rows]]


def answer_by_candidates(
    adata: ad.AnnData,
    model: Pretrained,
    instruction_model: InstructionModel,
    task: str,
    candidates: Sequence[str],
    abstract: str | None,
    key_added: str,
    copy: bool,
    *,
    asked_for: Collection[str] | None = None,
    threshold: float = 0.0,
    unknown: str = "",
    seed: int = 0,
    templates: int = 1,
    batch_size: int = 8,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    values: Values = COUNTS,
) -> ad.AnnData | None:
    """Score the candidate answers to a task for each cell, and write the most probable answer.

    Parameters
    ----------
    adata
        Cells. Results are written to `obs[key_added]`, `obs[key_added + "_probability"]`,
        `obsm[key_added + "_probabilities"]` and `uns[key_added]`.
    model
        Loaded model.
    instruction_model
        The same model, ready to answer questions.
    task
        Code of the task, a key of `sct.data.text.prompts.INSTRUCTIONS`.
    candidates
        Two or more possible answers.
    abstract
        Description of the study; by default `adata.uns["abstract"]`.
    key_added, copy, threshold, unknown
        See `sct.tl.annotate`.
    asked_for
        Answers whose total probability is written to `obs`. By default, the probability of the best answer is written.
    seed, templates, batch_size
        See `sct.generation.instruction_model.InstructionModel.score`.
    layer, gene_column, duplicates
        See `sct.tl.embed`.
    values
        "activity" if the matrix (X or `layer`) holds any non-negative values instead of counts, such as gene activities
        from chromatin data. Genes are binned by quantile within each cell, so only their order matters.
    """
    inputs.check_table(adata, copy)
    check_at_least("seed", seed, 0)
    check_key(key_added)
    check_at_least("batch_size", batch_size, 1)
    study_metadata = study_metadata_of(adata, "abstract", abstract, "a text")
    options = {"layer": layer, "gene_column": gene_column, "duplicates": duplicates, "values": values}
    logs = [
        instruction_model.score(
            task, records, [study_metadata] * len(keys), candidates, keys=keys, seed=seed, templates=templates,
            batch_size=batch_size,
        )
        for records, keys in blocks_of(adata, model, instruction_model, options)
    ]  # fmt: skip
    target = inputs.output_adata(adata, copy)
    write_answers(target, candidates, np.exp(np.concatenate(logs)), key_added, threshold, unknown, asked_for)
    target.uns[key_added] = {
        "sct_version": __version__, "model": repr(model), "weights": model.fingerprint, "task": task_name(task),
        "labels": list(candidates), "abstract": study_metadata, "templates": templates,
        "threshold": threshold, "seed": seed,
        "values": values, "learned": [task_name(each) for each in model.data["tasks"]],
    }  # fmt: skip
    return target if copy else None


class InstructionAnnotator:
    """Annotator that predicts cell types with an instruction-tuned model; see `sct.tl.annotate`."""

    options: tuple[str, ...] = (*OPTIONS, "abstract", "values")

    def __init__(self, model: Pretrained):
        self.model = model

    def annotate(
        self,
        adata: ad.AnnData,
        *,
        label_key: Any,
        candidates: Sequence[str] | None,
        key_added: str,
        copy: bool,
        abstract: str | None = None,
        **options: Any,
    ) -> ad.AnnData | None:
        """Predict the cell type of each cell; see `sct.tl.annotate`."""
        if label_key not in (None, "cell_type"):
            raise ConfigError(
                f"label_key is {label_key!r}, but this model only predicts cell types: do not pass "
                "`label_key`."
            )
        types = study_metadata_of(adata, "cell_types", candidates, "a list of names", "candidates")
        instruction_model = instruction_model_of(self.model)
        return answer_by_candidates(
            adata, self.model, instruction_model, "cta", types, abstract, key_added, copy, **options
        )
