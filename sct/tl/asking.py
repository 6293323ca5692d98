"""Questions about cells to a ZerOmics model: types, rare cells, tumour cells, pathways, or anything (ZerOmics, 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np

from sct import families
from sct.checks import check_at_least, check_text
from sct.data.counts import COUNTS, Values
from sct.data.text.instructions import NO, NORMAL, YES
from sct.errors import ConfigError
from sct.generation.decoding import DecodingOptions
from sct.generation.instruction_model import InstructionModel
from sct.inference import inputs
from sct.inference.asking import answer_by_candidates, blocks_of, check_key, study_metadata_of
from sct.version import __version__
from sct.weights.pretrained import Pretrained


def _able(adata: ad.AnnData, copy: bool, model: inputs.ModelLike) -> tuple[Pretrained, InstructionModel]:
    """Check the cells, and return the model, loaded, with what answers questions about cells by it."""
    inputs.check_table(adata, copy)
    handle = inputs.load_model(model)
    return handle, families.require(handle, "ask")


def find_rare(
    adata: ad.AnnData,
    model: inputs.ModelLike,
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
    handle, instruction_model = _able(adata, copy, model)
    return answer_by_candidates(
        adata,
        handle,
        instruction_model,
        "rci",
        (YES, NO),
        abstract,
        key_added,
        copy,
        asked_for=(YES,),
        **options,
    )


def find_tumor(
    adata: ad.AnnData,
    model: inputs.ModelLike,
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
    handle, instruction_model = _able(adata, copy, model)
    normal = {NORMAL, *instruction_model.normal}
    named = [
        each
        for each in study_metadata_of(adata, "diseases", diseases, "a list of names")
        if each not in normal
    ]
    if not named:
        raise ConfigError(
            f"diseases names no disease: give one or more; {NORMAL!r} is among the answers always."
        )
    return answer_by_candidates(
        adata,
        handle,
        instruction_model,
        "tcd",
        (*named, NORMAL),
        abstract,
        key_added,
        copy,
        asked_for=named,
        **options,
    )


def infer_pathways(
    adata: ad.AnnData,
    model: inputs.ModelLike,
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
    handle, instruction_model = _able(adata, copy, model)
    listed = study_metadata_of(adata, "gene_sets", gene_sets, "a list of names")
    return answer_by_candidates(
        adata, handle, instruction_model, "cpi", listed, abstract, key_added, copy, **options
    )


def ask(
    adata: ad.AnnData,
    model: inputs.ModelLike,
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
        See `sct.generation.decoding.DecodingOptions`.
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
    check_at_least("seed", seed, 0)
    check_key(key_added)
    check_text("question", question, advice="ask something")
    handle, instruction_model = _able(adata, copy, model)
    said = study_metadata_of(adata, "abstract", abstract, "a text")
    options = {"layer": layer, "gene_column": gene_column, "duplicates": duplicates, "values": values}
    how = DecodingOptions(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)
    texts: list[str] = []
    for records, keys in blocks_of(adata, handle, instruction_model, options):
        texts += instruction_model.ask(
            question, records, [said] * len(keys), keys=keys, seed=seed, options=how
        )
    target = inputs.output_adata(adata, copy)
    target.obs[key_added] = np.array(texts, dtype=object)
    target.uns[key_added] = {
        "sct_version": __version__, "model": repr(handle), "weights": handle.fingerprint, "question": question,
        "abstract": said, "temperature": temperature, "seed": seed, "values": values,
    }  # fmt: skip
    return target if copy else None
