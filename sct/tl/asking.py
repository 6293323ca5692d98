"""Questions about cells to a ZerOmics model: types, rare cells, tumour cells, pathways, or anything (ZerOmics, 3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct.data.alignment import check_shared
from sct.data.cells import Cells
from sct.data.counts import COUNTS, Values
from sct.data.quantile_bins import binned_cells
from sct.data.text.cell_sentence import cell_keys
from sct.data.text.instructions import NO, NORMAL, YES
from sct.errors import ConfigError, DataError
from sct.generation.cell_asker import CellAsker, Records
from sct.generation.decoding import Options
from sct.tl import running
from sct.tl.answers import write_answers
from sct.version import __version__
from sct.weights.pretrained import Pretrained

_BLOCK = 4096  # cells turned into records at once


def asker_of(model: Pretrained) -> CellAsker:
    """What a model learned of instructions; `ConfigError` for any other model."""
    return CellAsker.of(model.config, model.variables, model.tokenizer, model.genes, model.data)


def check_key(name: str) -> None:
    """Raise `ConfigError` for a name under which no file could keep results."""
    if not name:
        raise ConfigError("key_added is empty: give the name of a column.")


def _said(adata: ad.AnnData, name: str, given: Any, form: str, argument: str = "") -> Any:
    """What is said of the study, as given or in `uns`; `ConfigError` where it is neither."""
    argument = argument or name
    found = adata.uns.get(name) if given is None else given
    where = f'adata.uns["{name}"]' if given is None else argument
    if found is None:
        raise ConfigError(
            f'{argument}, {form}, is missing: give {argument}=..., or put it into adata.uns["{name}"].'
        )
    if form == "a text":
        if not isinstance(found, str) or not found.strip():
            raise ConfigError(f"{where} is {found!r}, but {form} is needed.")
        return found
    many = isinstance(found, Iterable) and not isinstance(found, str)
    names = list(found) if many else []
    if wrong := [each for each in names if not isinstance(each, str) or not each.strip()]:
        raise ConfigError(f"{where} has {wrong[0]!r}, but {form} is needed: leave it out.")
    if not names:
        raise ConfigError(f'{where} is {found!r}, but {form} is needed, such as ["one", "two"].')
    return [str(each) for each in names]


def _blocks(
    adata: ad.AnnData, model: Pretrained, asker: CellAsker, options: dict[str, Any]
) -> Iterator[tuple[Records, list[int]]]:
    """Cells as the model reads them, and their keys, some thousands at a time."""
    table = Cells(adata, model.vocabulary, **options)
    running.check_not_empty(table)
    measured = table.measured & asker.known
    possible = min(int(table.measured.sum()), int(asker.known.sum()))
    check_shared(int(measured.sum()), possible, "those of adata, and those with features in the model")
    keys = [int(key) for key in cell_keys(adata.obs_names)]
    for first in range(0, adata.n_obs, _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, adata.n_obs))
        counts = table.read(rows)
        empty = np.asarray(counts[:, asker.known].sum(axis=1)).ravel() == 0
        if empty.any():
            raise DataError(
                f"{int(empty.sum()):,} of {len(rows):,} cells have no count of the genes with features in the model "
                f"(the first is row {first + int(np.argmax(empty))}): leave them out."
            )
        yield binned_cells(counts, asker.cells, asker.known), keys[first : first + _BLOCK]


def answer_by_candidates(
    adata: ad.AnnData,
    model: running.Model,
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
    """Write the most probable of some answers to a task about each cell.

    Parameters
    ----------
    task
        Of `sct.data.text.prompts.INSTRUCTIONS`.
    candidates
        Answers, two or more.
    abstract
        What is said of the study, by default `adata.uns["abstract"]`.
    key_added, copy, threshold, unknown
        See `sct.tl.annotate`.
    asked_for
        Answers whose probability, of all of them together, is told in `obs`; by default that of the answer given.
    seed, templates, batch_size
        See `sct.generation.cell_asker.CellAsker.score`.
    layer, gene_column, duplicates
        See `sct.tl.embed`.
    values
        "activity" for a matrix that is no counts, such as fractional gene activities of chromatin: any values of at
        least 0, in X or in `layer`. A cell's genes are binned by their quantile, so their order alone matters.
    """
    running.check_table(adata, copy)
    running.check_seed(seed)
    check_key(key_added)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but it must be at least 1.")
    handle = running.loaded(model)
    asker = asker_of(handle)
    said = _said(adata, "abstract", abstract, "a text")
    options = {"layer": layer, "gene_column": gene_column, "duplicates": duplicates, "values": values}
    logs = [
        asker.score(
            task, records, [said] * len(keys), candidates, keys=keys, seed=seed, templates=templates,
            batch_size=batch_size,
        )
        for records, keys in _blocks(adata, handle, asker, options)
    ]  # fmt: skip
    target = running.to_write(adata, copy)
    write_answers(target, candidates, np.exp(np.concatenate(logs)), key_added, threshold, unknown, asked_for)
    target.uns[key_added] = {
        "sct_version": __version__, "model": repr(handle), "weights": handle.fingerprint, "task": task,
        "labels": list(candidates), "abstract": said, "templates": templates, "threshold": threshold, "seed": seed,
        "values": values, "learned": list(handle.data["tasks"]),
    }  # fmt: skip
    return target if copy else None


def annotate_by_instructions(
    adata: ad.AnnData,
    model: Pretrained,
    *,
    candidates: Sequence[str] | None,
    abstract: str | None = None,
    key_added: str,
    copy: bool,
    **options: Any,
) -> ad.AnnData | None:
    """Name the type of each cell; see `sct.tl.annotate`."""
    types = _said(adata, "cell_types", candidates, "a list of names", "candidates")
    return answer_by_candidates(adata, model, "cta", types, abstract, key_added, copy, **options)


def find_rare(
    adata: ad.AnnData,
    model: running.Model,
    *,
    abstract: str | None = None,
    key_added: str = "sct_rare",
    copy: bool = False,
    **options: Any,
) -> ad.AnnData | None:
    """Ask whether each cell is of a rare type (ZerOmics, rare cell identification).

    Parameters
    ----------
    adata
        Raw counts (N, n_var).
    model
        Of `sct.load`, or its path.
    abstract
        What is said of the study; by default `adata.uns["abstract"]`.
    key_added
        Results: `obs[key_added]`, "Yes" or "No"; `obs[key_added + "_probability"]`, that the cell is rare;
        `obsm[key_added + "_probabilities"]`, float32 (N, 2), of both; `uns[key_added]`, the parameters.
    copy
        Return a changed copy, and leave `adata` as it is.
    options
        See `answer_by_candidates`: `seed`, `templates`, `batch_size`, `layer`, `gene_column`, `duplicates`,
        `values`.

    Raises
    ------
    ConfigError
        The model did not learn instructions, or the abstract is missing.
    DataError
        No raw counts, unknown genes, cells without a count.
    """
    return answer_by_candidates(
        adata, model, "rci", (YES, NO), abstract, key_added, copy, asked_for=(YES,), **options
    )


def find_tumor(
    adata: ad.AnnData,
    model: running.Model,
    *,
    diseases: Sequence[str] | None = None,
    abstract: str | None = None,
    key_added: str = "sct_tumor",
    copy: bool = False,
    **options: Any,
) -> ad.AnnData | None:
    """Ask which of some diseases' tumours each cell is of, or whether it is normal (ZerOmics, tumor cell discovery).

    `uns[key_added]["learned"]` has the tasks that the model learned; only a pretrained LLaMA can answer others.

    Parameters
    ----------
    diseases
        Names of tumours; by default `adata.uns["diseases"]`. "normal cell" is among the answers always.
    adata, model, abstract, key_added, copy, options
        See `find_rare`: `obs[key_added]` is a disease or "normal cell", `obs[key_added + "_probability"]` that the cell
        is of any of the tumours; the columns of `obsm[key_added + "_probabilities"]` are `uns[key_added]["labels"]`.

    Raises
    ------
    ConfigError, DataError
        As `find_rare`, or the diseases are missing.
    """
    running.check_table(adata, copy)
    model = running.loaded(model)
    normal = {NORMAL, *asker_of(model).normal}
    named = [each for each in _said(adata, "diseases", diseases, "a list of names") if each not in normal]
    if not named:
        raise ConfigError(
            f"diseases names no disease: give one or more; {NORMAL!r} is among the answers always."
        )
    return answer_by_candidates(
        adata, model, "tcd", (*named, NORMAL), abstract, key_added, copy, asked_for=named, **options
    )


def infer_pathways(
    adata: ad.AnnData,
    model: running.Model,
    *,
    gene_sets: Sequence[str] | None = None,
    abstract: str | None = None,
    key_added: str = "sct_pathways",
    copy: bool = False,
    **options: Any,
) -> ad.AnnData | None:
    """Ask which pathways are active in each cell (ZerOmics, cell pathway inference; no model was tuned on this task).

    Parameters
    ----------
    gene_sets
        Names of pathways, two or more; by default `adata.uns["gene_sets"]`. A mapping of names to genes does as well,
        whose names count.
    adata, model, abstract, key_added, copy, options
        See `find_rare`: `obs[key_added]` is the most probable pathway, `obs[key_added + "_probability"]` its own,
        `obsm[key_added + "_probabilities"]` (N, sets)
        adds up to one over the pathways and ranks them.

    Raises
    ------
    ConfigError, DataError
        As `find_rare`, or the pathways are missing.
    """
    running.check_table(adata, copy)
    listed = _said(adata, "gene_sets", gene_sets, "a list of names")
    return answer_by_candidates(adata, model, "cpi", listed, abstract, key_added, copy, **options)


def ask(
    adata: ad.AnnData,
    model: running.Model,
    question: str,
    *,
    abstract: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    key_added: str = "sct_answer",
    copy: bool = False,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    values: Values = COUNTS,
) -> ad.AnnData | None:
    """Ask any question about each cell, and write the free text of the answer.

    Parameters
    ----------
    question
        What to ask, behind the cell and what is said of its study.
    max_new_tokens, temperature, batch_size
        See `sct.generation.decoding.Options`.
    seed
        Of what is drawn where `temperature` is above 0.
    adata, model, abstract, copy, layer, gene_column, duplicates, values
        See `find_rare`.
    key_added
        Results: `obs[key_added]`, texts; `uns[key_added]`, the parameters.

    Raises
    ------
    ConfigError, DataError
        As `find_rare`, or the question is empty.
    """
    running.check_table(adata, copy)
    running.check_seed(seed)
    check_key(key_added)
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"question is {question!r}, but it must be a non-empty string.")
    handle = running.loaded(model)
    asker = asker_of(handle)
    said = _said(adata, "abstract", abstract, "a text")
    options = {"layer": layer, "gene_column": gene_column, "duplicates": duplicates, "values": values}
    how = Options(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)
    texts: list[str] = []
    for records, keys in _blocks(adata, handle, asker, options):
        texts += asker.ask(question, records, [said] * len(keys), keys=keys, seed=seed, options=how)
    target = running.to_write(adata, copy)
    target.obs[key_added] = np.array(texts, dtype=object)
    target.uns[key_added] = {
        "sct_version": __version__, "model": repr(handle), "weights": handle.fingerprint, "question": question,
        "abstract": said, "temperature": temperature, "seed": seed, "values": values,
    }  # fmt: skip
    return target if copy else None
