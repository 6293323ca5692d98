"""`sct.tl.to_sentences`, `sct.tl.generate_cells`, `sct.tl.describe`: convert cells to text and text to cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from sct import families
from sct.checks import check_at_least, check_choice, check_not_empty
from sct.data import counts
from sct.data.cells import CellCounts
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.text.cell_sentence import cell_keys, sentences
from sct.data.text.prompts import parse_labels, render_labels
from sct.data.text.source import sentence_gene_names
from sct.errors import ConfigError
from sct.generation.cell_sentence_model import CellSentenceModel
from sct.inference import inputs
from sct.inference.readers import BLOCK
from sct.inference.sentences import questions, written
from sct.version import __version__


def to_sentences(
    adata: ad.AnnData,
    *,
    top_k: int | None = None,
    seed: int = 0,
    model: inputs.ModelLike | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
) -> pd.Series:
    """Convert each cell to a cell sentence: its expressed genes in descending order (Cell2Sentence paper, section 3.1).

    Genes with equal counts are in random order. The random order depends only on the seed and on the names of the cell
    and the genes.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed.
    top_k
        Maximum number of genes in a sentence. Default: all expressed genes; with `model`, the number that the model
        reads.
    seed
        Random seed of the order of genes with equal counts.
    model
        Cell-sentence model whose gene names are used. Genes that this model does not know are left out. Without a
        model, all genes of `adata` are written with their names. Ensembl ids in the human gene table are replaced by
        symbols.
    layer
        Layer with the raw counts. By default, the first of X, raw and layers["counts"] that holds raw counts.
    gene_column, duplicates
        With `model`: see `sct.GeneVocabulary.align`.

    Returns
    -------
    Sentences, indexed by cell. A cell without counts has an empty sentence.

    Raises
    ------
    ConfigError
        `gene_column` or `duplicates` is set without `model`.
    DataError
        The data has no raw counts, a gene name occurs more than once, or a gene name contains white space.
    """
    inputs.check_table(adata, False)
    check_at_least("seed", seed, 0)
    if top_k is not None:
        check_at_least("top_k", top_k, 1, advice="leave it out to write all expressed genes")
    if model is None and (gene_column is not None or duplicates != "error"):
        raise ConfigError(
            "`gene_column` and `duplicates` have no effect without a model: set `model`, or do not pass "
            "these two options."
        )
    if model is not None:
        handle = inputs.load_model(model)
        sentence_model = families.require(handle, "generate")
        table = CellCounts(
            adata, handle.vocabulary, layer=layer, gene_column=gene_column, duplicates=duplicates
        )
        made = written(table, sentence_model, np.arange(adata.n_obs), top_k=top_k, seed=seed)
    else:
        found = counts.validate(adata, layer=layer)
        gene_names, keys = _gene_names(found.var), cell_keys(adata.obs_names)
        made = []
        for start in range(0, adata.n_obs, BLOCK):
            block = sparse.csr_matrix(counts.exact_integers(found.matrix[start : start + BLOCK]))
            made += sentences(block, gene_names, top_k=top_k, seed=seed, keys=keys[start : start + BLOCK])
    return pd.Series(made, index=adata.obs_names, name="sentence", dtype=object)


def _gene_names(var: pd.DataFrame) -> list[str]:
    """Return the name of each gene.

    A name that is an Ensembl id in the human gene table is replaced by the gene symbol.
    """
    names = [str(name) for name in var.index]
    human = GeneVocabulary.human()
    symbols = dict(zip(human.ensembl_ids, sentence_gene_names(human), strict=True))
    known = [symbols.get(name.partition(".")[0], name) if name.startswith("ENSG") else name for name in names]
    return known if len(set(known)) == len(set(names)) else names


def generate_cells(
    model: inputs.ModelLike,
    *,
    cell_type: str | Sequence[str] | None = None,
    tissue: str | Sequence[str] | None = None,
    labels: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    text: str | Sequence[str] | None = None,
    n: int = 1,
    seed: int = 0,
    fit: str = "all",
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
) -> ad.AnnData:
    """Generate cell sentences and convert them to expression (Cell2Sentence paper, section 3.1 and appendix D).

    Parameters
    ----------
    model
        Cell-sentence model: result of `sct.load`, a path or a Hub id.
    cell_type, tissue, labels, text
        Condition of the generation; set at most one. `cell_type`: a cell type. `tissue`: a tissue. `labels`: labels
        that the model learned together, such as {"cell type": "T cell", "exposure": "acute"}. `text`: an abstract of a
        study. A list generates `n` cells for each of its entries. Without a condition, generation is unconditional.
    n
        Number of cells per condition.
    seed
        Random seed. The same seed gives the same cells.
    fit
        Name of the training study whose linear fit converts gene ranks to expression. "all" is the fit over all
        studies.
    temperature, top_p
        Sampling temperature and nucleus sampling. Default: the values of the paper, 0.7 and 0.9.
    max_new_tokens
        Maximum number of tokens per cell. Default: enough for the longest sentence that the model learned.
    batch_size
        Number of cells generated at once.

    Returns
    -------
    AnnData with the genes of the model (`var`: Ensembl ids and symbols). X is float32, log10(1 + counts per 10,000).
    `obs` has the condition, `sentence`, `n_words`, `n_valid` (words that are gene names), `n_unique` (different genes),
    `valid_share` (`n_valid` / `n_words`), `unique_share` (`n_unique` / `n_words`) and `finished` (whether the model
    ended the sentence itself). `uns["sct"]` has the model, the seed and the options.

    Raises
    ------
    ConfigError
        Several conditions are set, or the model did not learn the condition.
    """
    handle = inputs.load_model(model)
    sentence_model = families.require(handle, "generate")
    check_at_least("seed", seed, 0)
    sentence_model.line(fit)
    check_at_least("n", n, 1)
    given = {"cell_type": cell_type, "tissue": tissue, "labels": labels, "abstract": text}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) > 1:
        given_as = ["text" if name == "abstract" else name for name in asked]
        raise ConfigError(
            f"{' and '.join(given_as)} are all set, but only one condition is allowed: keep one of them, or "
            "combine labels in the option `labels`."
        )
    name = next(iter(asked), None)
    task = "unconditional" if name is None else f"{name}_to_cell"
    many: Sequence[Any] = [None]
    if name is not None:
        value = asked[name]
        many = [value] if isinstance(value, str | Mapping) else list(value)
        sentence_model.check(task)
        _check_known(sentence_model, name, many)
        if name == "labels":
            many = [_in_order(sentence_model, each) for each in many]
    wanted = [value for value in many for _ in range(n)]
    cut = {"num_genes": sentence_model.top_k} if sentence_model.top_k else {}
    fields = [cut if value is None else {name: value, **cut} for value in wanted]
    made = sentence_model.answer(
        task, fields, seed=seed, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )  # fmt: skip
    # If the output does not match the answer template, its words still count, as invalid ones.
    texts = made["answer"].where(made["answer"].notna(), made["text"]).tolist()
    matrix, table = sentence_model.expression(texts, fit)
    obs = table.set_axis(pd.Index([f"generated_{i}" for i in range(len(wanted))]), axis=0)
    obs.insert(0, "sentence", texts)
    obs["finished"] = made["finished"].to_numpy()
    if name is not None:
        shown = [render_labels(value) if isinstance(value, Mapping) else str(value) for value in wanted]
        obs.insert(0, name, pd.Categorical(shown))
    if name == "labels":
        for key in sorted({key for value in many for key in value}):
            obs[key] = pd.Categorical([str(value.get(key, "")) for value in wanted])
    genes = handle.vocabulary
    var = pd.DataFrame(
        {"ensembl_id": list(genes.ensembl_ids)},
        index=pd.Index(sentence_model.gene_names, name="symbol"),
    )
    adata = ad.AnnData(matrix, obs=obs, var=var)
    adata.uns["sct"] = {
        "sct_version": __version__, "model": repr(handle), "weights": handle.fingerprint, "seed": seed, "fit": fit,
        "task": task, "units": "log10(1 + counts per 10,000)",
    }  # fmt: skip
    return adata


def _check_known(sentence_model: CellSentenceModel, name: str, many: Sequence[Any]) -> None:
    """Raise `ConfigError` for a cell type or tissue that the model did not see in training."""
    check_not_empty(name, many)
    known = sentence_model.labels.get(name)
    if name not in ("cell_type", "tissue") or known is None:
        return
    for value in many:
        check_choice(name, value, known, advice="choose one from the training data of the model")


def _in_order(sentence_model: CellSentenceModel, labels: Any) -> dict[str, Any]:
    """Return labels in the order of the training data; raise `ConfigError` if a label is missing or unknown."""
    learned = list(parse_labels(next(iter(sentence_model.labels.get("labels", [""])), "")))
    if not isinstance(labels, Mapping) or (learned and set(labels) != set(learned)):
        if not isinstance(labels, Mapping):
            raise ConfigError(
                f"`labels` contains {labels!r}, but must contain dicts: pass a dict from label name to value per "
                "condition."
            )
        raise ConfigError(
            f"`labels` has {', '.join(map(str, labels))}, but the model learned {', '.join(learned)} together: set "
            "exactly the labels that the model learned."
        )
    return {key: labels[key] for key in learned or labels}


def describe(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    *,
    seed: int = 0,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    key_added: str = "sct_description",
    copy: bool = False,
) -> ad.AnnData | None:
    """Describe each cell in text: generate the abstract of a matching study (Cell2Sentence paper, section 4.4).

    Parameters
    ----------
    adata
        Raw counts (N, n_var).
    model
        Cell-sentence model that was trained on abstracts (task cell_to_abstract).
    seed, temperature, top_p, max_new_tokens, batch_size
        See `sct.tl.generate_cells`.
    layer, gene_column, duplicates
        See `sct.tl.embed`.
    key_added
        `obs[key_added]`: the texts. `uns[key_added]`: the parameters.
    copy
        If True, return a modified copy and leave `adata` unchanged.

    Raises
    ------
    ConfigError
        The model was not trained on the task cell_to_abstract.
    DataError
        The data has no raw counts, too few genes of the model, or cells without counts.
    """
    inputs.check_table(adata, copy)
    handle = inputs.load_model(model)
    sentence_model = families.require(handle, "describe")
    sentence_model.check("cell_to_abstract")
    fields, keys = questions(
        adata, handle, sentence_model, seed=seed, layer=layer, gene_column=gene_column, duplicates=duplicates
    )
    made = sentence_model.answer(
        "cell_to_abstract", fields, seed=seed, keys=keys.tolist(), temperature=temperature, top_p=top_p,
        max_new_tokens=max_new_tokens, batch_size=batch_size,
    )  # fmt: skip
    target = inputs.output_adata(adata, copy)
    target.obs[key_added] = made["answer"].where(made["answer"].notna(), made["text"]).to_numpy()
    target.uns[key_added] = {
        "sct_version": __version__, "model": repr(handle), "weights": handle.fingerprint, "seed": seed,
    }  # fmt: skip
    return target if copy else None
