"""Ask a ZerOmics model about rare cells, tumor cells, pathways or anything else (ZerOmics paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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


def _load(adata: ad.AnnData, copy: bool, model: inputs.ModelLike) -> tuple[Pretrained, InstructionModel]:
    """Check the input AnnData and load the model.

    Return the loaded model and the object that answers questions with it.
    """
    inputs.check_table(adata, copy)
    handle = inputs.load_model(model)
    return handle, families.require(handle, "ask")


def find_rare(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    *,
    abstract: str | None = None,
    seed: int = 0,
    templates: int = 1,
    batch_size: int = 8,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    values: Values = COUNTS,
    key_added: str = "sct_rare",
    copy: bool = False,
) -> ad.AnnData | None:
    """Find rare cells: ask the model whether each cell belongs to a rare type (ZerOmics paper, section 3.2).

    Parameters
    ----------
    adata
        Raw counts (N, n_var).
    model
        Instruction-tuned ZerOmics model: result of `sct.load`, a path or a Hub id.
    abstract
        Abstract of the study, which the model reads with each cell. Default: `adata.uns["abstract"]`.
    seed
        Random seed of the order in which the question lists the possible answers.
    templates
        Number of question templates. The probabilities are averaged over the templates.
    batch_size
        Number of cells processed at once.
    layer, gene_column, duplicates
        See `sct.tl.embed`.
    values
        "activity" for values that are not counts, such as gene activity of chromatin.
    key_added
        Prefix of the results. `obs[key_added]`: "Yes" or "No". `obs[key_added + "_probability"]`: probability that
        the cell is rare. `obsm[key_added + "_probabilities"]`: float32 (N, 2), probabilities of "Yes" and "No".
        `uns[key_added]`: the parameters.
    copy
        If True, return a modified copy and leave `adata` unchanged.

    Raises
    ------
    ConfigError
        The model is not instruction-tuned, or the abstract is missing.
    DataError
        The data has no raw counts, too few genes of the model, or cells without counts.
    """
    handle, instruction_model = _load(adata, copy, model)
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
        seed=seed,
        templates=templates,
        batch_size=batch_size,
        layer=layer,
        gene_column=gene_column,
        duplicates=duplicates,
        values=values,
    )


def find_tumor(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    *,
    diseases: Sequence[str] | None = None,
    abstract: str | None = None,
    seed: int = 0,
    templates: int = 1,
    batch_size: int = 8,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    values: Values = COUNTS,
    key_added: str = "sct_tumor",
    copy: bool = False,
) -> ad.AnnData | None:
    """Find tumor cells: ask the model which tumor each cell comes from, or whether it is a normal cell.

    This is the task "tumor cell discovery" of the ZerOmics paper. `uns[key_added]["learned"]` lists the tasks that the
    model was trained on. Only a model with a pretrained LLaMA can answer tasks that it was not trained on.

    Parameters
    ----------
    diseases
        Names of tumors. Default: `adata.uns["diseases"]`. The answer "normal cell" is always added.
    adata, model, abstract, seed, templates, batch_size, layer, gene_column, duplicates, values, copy
        See `find_rare`.
    key_added
        Prefix of the results. `obs[key_added]`: a tumor or "normal cell". `obs[key_added + "_probability"]`:
        probability that the cell comes from any of the tumors. `obsm[key_added + "_probabilities"]`: float32
        (N, answers); `uns[key_added]["labels"]` names its columns. `uns[key_added]`: the parameters.

    Raises
    ------
    ConfigError, DataError
        See `find_rare`; `ConfigError` also if `diseases` is missing.
    """
    handle, instruction_model = _load(adata, copy, model)
    normal = {NORMAL, *instruction_model.normal}
    named = [
        each
        for each in study_metadata_of(adata, "diseases", diseases, "a list of names")
        if each not in normal
    ]
    if not named:
        raise ConfigError(
            f"`diseases` names no tumor, but at least one is needed: add the name of a tumor; the answer "
            f"{NORMAL!r} is added automatically."
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
        seed=seed,
        templates=templates,
        batch_size=batch_size,
        layer=layer,
        gene_column=gene_column,
        duplicates=duplicates,
        values=values,
    )


def infer_pathways(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    *,
    gene_sets: Sequence[str] | None = None,
    abstract: str | None = None,
    seed: int = 0,
    templates: int = 1,
    batch_size: int = 8,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    values: Values = COUNTS,
    key_added: str = "sct_pathways",
    copy: bool = False,
) -> ad.AnnData | None:
    """Rank pathways by their predicted activity in each cell.

    This is the task "cell pathway inference" of the ZerOmics paper. Models answer it zero-shot: they are not trained on
    this task.

    Parameters
    ----------
    gene_sets
        Names of two or more pathways. Default: `adata.uns["gene_sets"]`. A mapping from names to genes also works;
        only its names are used.
    adata, model, abstract, seed, templates, batch_size, layer, gene_column, duplicates, values, copy
        See `find_rare`.
    key_added
        Prefix of the results. `obs[key_added]`: the most probable pathway. `obs[key_added + "_probability"]`: its
        probability. `obsm[key_added + "_probabilities"]`: float32 (N, pathways), the probabilities by which the
        pathways are ranked; they sum to 1 in each cell. `uns[key_added]`: the parameters.

    Raises
    ------
    ConfigError, DataError
        See `find_rare`; `ConfigError` also if `gene_sets` is missing.
    """
    handle, instruction_model = _load(adata, copy, model)
    listed = study_metadata_of(adata, "gene_sets", gene_sets, "a list of names")
    return answer_by_candidates(
        adata, handle, instruction_model, "cpi", listed, abstract, key_added, copy, seed=seed, templates=templates,
        batch_size=batch_size, layer=layer, gene_column=gene_column, duplicates=duplicates, values=values,
    )  # fmt: skip


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
    """Ask any question about each cell and write the answer as free text.

    Parameters
    ----------
    question
        Question to ask about each cell. In the prompt, the question follows the abstract and the cell.
    max_new_tokens
        Maximum number of tokens in an answer.
    temperature
        Sampling temperature; 0 always takes the most probable token.
    batch_size
        Number of cells processed at once.
    seed
        Random seed of the sampling. No effect if `temperature` is 0.
    adata, model, abstract, copy, layer, gene_column, duplicates, values
        See `find_rare`.
    key_added
        `obs[key_added]`: the answers. `uns[key_added]`: the parameters.

    Raises
    ------
    ConfigError, DataError
        See `find_rare`; `ConfigError` also if the question is empty.
    """
    check_at_least("seed", seed, 0)
    check_key(key_added)
    check_text("question", question, advice="pass the question as text")
    handle, instruction_model = _load(adata, copy, model)
    study_metadata = study_metadata_of(adata, "abstract", abstract, "a text")
    options = {"layer": layer, "gene_column": gene_column, "duplicates": duplicates, "values": values}
    how = DecodingOptions(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)
    texts: list[str] = []
    for records, keys in blocks_of(adata, handle, instruction_model, options):
        texts += instruction_model.ask(
            question, records, [study_metadata] * len(keys), keys=keys, seed=seed, options=how
        )
    target = inputs.output_adata(adata, copy)
    target.obs[key_added] = np.array(texts, dtype=object)
    target.uns[key_added] = {
        "sct_version": __version__, "model": repr(handle), "weights": handle.fingerprint, "question": question,
        "abstract": study_metadata, "temperature": temperature, "seed": seed, "values": values,
    }  # fmt: skip
    return target if copy else None
