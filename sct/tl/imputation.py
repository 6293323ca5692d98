"""`sct.tl.impute`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import softmax

from sct import families
from sct.checks import check_at_least, check_shape
from sct.data.bag_order import BagOrder, masked_cell_order
from sct.data.cells import CellCounts, Section
from sct.data.class_prior import ClassPrior
from sct.data.tokenize import bin_counts, expected_counts
from sct.errors import ConfigError, DataError
from sct.inference import inputs
from sct.inference.bags import BagReader, plan_bags

MISSING = "missing"
# Endings of the names of results.
RESULTS = ("expected", "level", "probability")
# Share of a bag's cells that are hidden together where whole cells are imputed: 10 of 50.
HIDDEN_SHARE = 0.2
_BLOCK = 2_000


def impute(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    *,
    genes: str | Iterable[str] | None = None,
    cells: Any = None,
    layer: str | None = None,
    key_added: str = "sct",
    batch_key: str | None = None,
    spatial_key: str | None = None,
    cells_per_bag: int | None = None,
    batch_size: int | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    seed: int = 0,
    copy: bool = False,
) -> ad.AnnData | None:
    """Predict the expression of genes or of whole cells from all the rest (sCT paper, section 4).

    What is asked for is hidden from the model, whether it was measured or not, and predicted as a
    distribution over expression levels. The expected raw count is the sum of the levels' probabilities times the
    counts that stand for them: the means of the cell's own levels among the genes that are shown; for a cell of
    which nothing is shown, the average of these means over the shown cells of its bag. For level 1 it is what the
    gene has there, see `sct.data.tokenize.expected_counts`.

    Probabilities are those of a gene chosen regardless of its expression. Training masks expressed genes more often
    than others; where the loss did not correct for that, the correction is made here (`sct.data.class_prior`).

    Results, for `key_added="sct"`:

    - `layers["sct_expected"]` (N, n_var) float32 CSR: raw counts, with the expected count in place of what was
      imputed; `layers["sct_level"]` uint8 CSR: the same with the most likely levels (0 unexpressed, 1 lowest, ...;
      what was counted by the range of all counts of its cell; genes the model does not know have none);
      `layers["sct_probability"]` float32 CSR: the same with the probability that the raw count is at least 1 (what
      was not imputed has 1 or 0, by its count).
    - for genes that are not in `adata.var` or stand in several of its columns, and for a backed `adata`:
      `obsm["sct_expected"]`, `obsm["sct_level"]` and `obsm["sct_probability"]`, tables (N, genes) with the names that
      were given; NaN for cells that were not asked for.
    - `uns["sct"]`: what was imputed (`genes`, `cells`; `var_names` of those in layers), and the parameters.

    X is never changed; results of an earlier call with this `key_added` are removed. Bags are those of
    `sct.tl.embed`; where whole cells are imputed one cell or a fifth of a bag is hidden, and the rest are cells
    that are shown: random ones, or with positions the nearest.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed.
    model
        Of `sct.load`, or its path.
    genes
        Ids or symbols of the model's vocabulary, in `adata` or not; "missing" for all genes of the vocabulary
        that the panel lacks (N x thousands of values).
    cells
        Cells to impute as a whole, all their genes in `adata` (with `genes`: these genes in these cells only):
        names, row numbers, or a mask (N,).
    layer, batch_key, spatial_key, cells_per_bag, batch_size, gene_column, duplicates, seed, copy
        See `sct.tl.embed`.
    key_added
        Beginning of the names of the results.

    Raises
    ------
    ConfigError
        Neither genes nor cells are given.
    DataError
        Unknown genes or cells, no cell left to look at, and what `sct.tl.embed` refuses.
    CheckpointError
        What the model computes is not finite; nothing is written then.
    """
    inputs.check_table(adata, copy)
    if genes is None and cells is None:
        raise ConfigError(
            'say what to impute: genes=["CD3E", ...], genes="missing" for genes that the panel lacks, or cells=...'
        )
    handle = inputs.load_model(model)
    reader: BagReader = families.require(handle, "impute")
    prior = ClassPrior.of(handle.data)
    prior.warn()
    size = reader.cells_per_bag(cells_per_bag)
    if adata.isbacked and cells is not None:
        raise DataError(
            "of a backed AnnData only genes are imputed: load it with adata.to_memory() for whole cells."
        )
    check_at_least("seed", seed, 0)
    chosen = None if cells is None else _rows(adata, cells)
    sections = inputs.sections(adata, batch_key, spatial_key)
    table = CellCounts(
        adata, handle.vocabulary, sections, layer=layer, gene_column=gene_column, duplicates=duplicates
    )
    if table.counts_from == "raw.X" and not (adata.var_names.is_unique and adata.raw.var_names.is_unique):
        raise DataError(
            "names in var or raw.var occur more than once, so the genes of raw cannot be told apart in var: call "
            "adata.var_names_make_unique(), and make those of raw unique."
        )
    column = _columns(adata, table)
    wanted, names = _genes(handle, table, column, genes)
    whole = chosen is not None and genes is None
    inputs.check_counted(table, ~chosen if whole and chosen is not None else None)
    if whole and chosen is not None:
        orders = [_masked_cell_order(section, chosen[section.rows], size, seed) for section in sections]
    else:
        orders = [plan_bags(section, size, seed) for section in sections]

    everywhere = np.ones(adata.n_obs, bool) if chosen is None else chosen
    masked_genes = None if whole else np.isin(np.arange(len(handle.vocabulary)), wanted)
    result = _predict(reader, prior, table, orders, wanted, everywhere, masked_genes, batch_size)
    target = inputs.output_adata(adata, copy)
    there = _write(target, table, column, wanted, names, everywhere, result, key_added, handle)
    inputs.keep_scales(target, sections, batch_key, spatial_key)
    target.uns[key_added] = dict(
        inputs.record(
            handle, table, cells_per_bag=size, batch_key=batch_key, spatial_key=spatial_key, seed=seed,
            class_offset=prior.offset,
            genes=np.asarray([] if whole else names, dtype=str),
            var_names=np.asarray(target.var_names[column[wanted[there]]], dtype=str),
            cells=np.asarray([] if chosen is None else adata.obs_names[chosen], dtype=str),
        )
    )  # fmt: skip
    return target if copy else None


def _masked_cell_order(
    section: Section, hidden: np.ndarray, cells_per_bag: int, seed: int
) -> BagOrder | None:
    """Bags of a section that holds hidden cells (n,), None for another."""
    where = f" of {section.name}" if section.name else ""
    if not hidden.any():
        return None
    if hidden.all():
        raise DataError(
            f"all {len(hidden):,} cells{where} are to be imputed, but some must be left to look at: choose fewer."
        )
    if cells_per_bag < 2:
        raise ConfigError(
            "a bag has one cell, but whole cells are imputed from others: set cells_per_bag to 2 or more."
        )
    # Not more than the share of the cells that there are, so that a small section is mostly seen.
    most = max(1, int(HIDDEN_SHARE * min(cells_per_bag, len(hidden))))
    return masked_cell_order(section.rows, hidden, cells_per_bag, most, seed, section.places)


def _rows(adata: ad.AnnData, cells: Any) -> np.ndarray:
    """Mask (N,) of the cells that a person names."""
    given = np.asarray(cells)
    mask = np.zeros(adata.n_obs, bool)
    if given.dtype == bool:
        check_shape("the mask of cells", given, ((adata.n_obs, "cells"),))
        mask = given.copy()
    elif given.dtype.kind in "iu":
        if given.size and not (given.min() >= 0 and given.max() < adata.n_obs):
            raise DataError(
                f"cells name rows {given.min()} to {given.max()}, but there are 0 to {adata.n_obs - 1}."
            )
        mask[given] = True
    else:
        if not adata.obs_names.is_unique:
            raise DataError(
                "names in obs_names occur more than once, but each must name one cell: call "
                "adata.obs_names_make_unique() if they are different cells."
            )
        found = adata.obs_names.get_indexer(np.atleast_1d(given).astype(str))
        if (found < 0).any():
            lost = np.atleast_1d(given)[found < 0]
            raise DataError(
                f"{len(lost):,} cells are not in obs_names (first: {str(lost[0])!r}): give names that are."
            )
        mask[found] = True
    if not mask.any():
        raise DataError("no cell is chosen: name at least one in cells.")
    return mask


def _genes(
    model: Any, table: CellCounts, column: np.ndarray, genes: str | Iterable[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Positions in the vocabulary, and names, of the genes that are to be predicted."""
    vocabulary = model.vocabulary
    if genes is None:
        wanted = np.flatnonzero(table.measured & (column >= 0))
        return wanted, [vocabulary.keys[gene] for gene in wanted]
    if isinstance(genes, str) and genes == MISSING:
        wanted = np.flatnonzero(~table.measured)
        if not len(wanted):
            raise DataError("the panel lacks no gene of the vocabulary: name the genes to impute.")
        alone = [
            vocabulary.owners_of_symbol.get(vocabulary.symbols[gene]) == (gene,) for gene in wanted.tolist()
        ]
        return wanted, [
            vocabulary.symbols[gene] if unique else vocabulary.keys[gene]
            for gene, unique in zip(wanted.tolist(), alone, strict=True)
        ]
    listed = [genes] if isinstance(genes, str) else list(genes)
    return vocabulary.find(listed), listed


@dataclasses.dataclass(frozen=True)
class _Predictions:
    """What is predicted of the chosen cells (m,) and wanted genes (n,).

    Attributes
    ----------
    rows
        int (m,) rows of the table.
    values
        By the ending of its name (`RESULTS`): expected counts and probability of expression float32 (m, n), level
        uint8.
    """

    rows: np.ndarray
    values: dict[str, np.ndarray]


def _predict(
    reader: BagReader,
    prior: ClassPrior,
    table: CellCounts,
    orders: list[BagOrder | None],
    wanted: np.ndarray,
    chosen: np.ndarray,
    masked_genes: np.ndarray | None,
    batch_size: int | None,
) -> _Predictions:
    """Predict the wanted genes of the chosen cells."""
    config = reader.model.config
    whole = masked_genes is None
    places = np.flatnonzero(chosen)
    slot = np.full(table.n_cells, -1)
    slot[places] = np.arange(len(places))
    shape = (len(places), len(wanted))
    expected, probability = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    level = np.zeros(shape, np.uint8)

    def masked(bag: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
        tokens, masked_slots = bag["tokens"].copy(), np.flatnonzero(chosen[rows])
        if whole:  # as in training: what was not measured is not masked
            tokens[masked_slots] = np.where(
                bag["measured"] & (tokens[masked_slots] < config.num_bins), config.mask, tokens[masked_slots]
            )
        else:
            tokens[np.ix_(masked_slots, wanted)] = config.mask
        asked = np.zeros(most, np.int32)
        flat = (masked_slots[:, None] * config.num_genes + wanted).ravel()
        asked[: len(flat)] = flat
        return {"tokens": tokens, "positions": asked}

    # As many positions as the fullest bag asks for, so that one program serves all.
    full = max(
        int(chosen[order.rows.reshape(-1, order.cells_per_bag)].sum(axis=1).max())
        for order in orders
        if order is not None
    )
    most = full * len(wanted)
    for one in reader.results(
        table, orders, ("logits",), "imputing", batch_size, inputs=masked, with_counts=True, masked_cells=chosen,
        masked_genes=masked_genes,
    ):  # fmt: skip
        masked_slots = np.flatnonzero(chosen[one.rows])
        keep = one.is_target[masked_slots]
        if not keep.any():
            continue
        logits = one.outputs["logits"][: len(masked_slots) * len(wanted), : config.num_bins]
        logits = logits + prior.offset * (np.arange(config.num_bins) == 0)
        chance = softmax(logits, axis=-1).reshape(len(masked_slots), len(wanted), -1)
        seen = [one.bag[name][masked_slots] for name in ("means", "low", "high")]
        if whole:
            shown = ~chosen[one.rows]
            seen = [
                np.broadcast_to(one.bag[name][shown].mean(axis=0), values.shape)
                for name, values in zip(("means", "low", "high"), seen, strict=True)
            ]
        each = [np.repeat(values, len(wanted), axis=0) for values in seen]
        counts = expected_counts(chance.reshape(-1, config.num_bins), *each).reshape(chance.shape[:2])
        at = slot[one.rows[masked_slots[keep]]]
        expected[at], level[at] = counts[keep], chance[keep].argmax(axis=-1)
        probability[at] = chance[keep, :, 1:].sum(axis=-1)
    return _Predictions(places, dict(zip(RESULTS, (expected, level, probability), strict=True)))


def _write(
    target: ad.AnnData,
    table: CellCounts,
    column: np.ndarray,
    wanted: np.ndarray,
    names: list[str],
    chosen: np.ndarray,
    result: _Predictions,
    key: str,
    model: Any,
) -> np.ndarray:
    """Put predictions into layers, and those of genes that `var` lacks into obsm; return which are in layers."""
    places = result.rows
    there = column[wanted] >= 0
    if target.isbacked:
        there[:] = False
    for name in (
        f"{key}_{ending}" for ending in result.values
    ):  # of an earlier call, about other genes or cells
        for slot in (target.layers, target.obsm):
            if name in slot:
                del slot[name]
    if there.any():
        shape = (target.n_obs, target.n_vars)
        inside = column[wanted[there]]
        is_target = _counts(target, table)
        levels = _levels(target, table, column, model)
        bases = dict(zip(RESULTS, (is_target, levels, (is_target > 0).astype(np.float32)), strict=True))
        for ending, predicted in result.values.items():
            name, base, values = f"{key}_{ending}", bases[ending], predicted[:, there]
            taken = np.zeros(target.n_vars, bool)
            taken[inside] = True
            base = base.tocoo()
            keep = ~(chosen[base.row] & taken[base.col])
            rows, columns = np.broadcast_arrays(places[:, None], inside[None, :])
            filled = sparse.coo_matrix(
                (
                    np.concatenate([base.data[keep].astype(values.dtype), values.ravel()]),
                    (
                        np.concatenate([base.row[keep], rows.ravel()]),
                        np.concatenate([base.col[keep], columns.ravel()]),
                    ),
                ),
                shape=shape,
            ).tocsr()
            filled.eliminate_zeros()
            target.layers[name] = filled
    if not there.all():
        for ending, values in result.values.items():
            name = f"{key}_{ending}"
            whole = values[:, ~there]
            if len(places) < target.n_obs:  # cells that were not asked for have no value, and no level either
                whole = np.full((target.n_obs, whole.shape[1]), np.nan, np.float32)
                whole[places] = values[:, ~there]
            lacking = [gene for gene, inside in zip(names, there, strict=True) if not inside]
            target.obsm[name] = pd.DataFrame(whole, index=target.obs_names, columns=lacking)
    return there


def _columns(target: ad.AnnData, table: CellCounts) -> np.ndarray:
    """Column of `target.var` that holds each gene of the vocabulary, -1 where there is none or several do."""
    column = np.full(len(table.vocabulary), -1)
    of_input = table.alignment.columns
    times = np.bincount(of_input[of_input >= 0], minlength=len(column))
    used = np.flatnonzero((of_input >= 0) & (times[of_input] == 1))
    if table.counts_from == "raw.X":
        names = np.asarray(target.raw.var_names)
        where = target.var_names.get_indexer(names[used])
        column[of_input[used[where >= 0]]] = where[where >= 0]
    else:
        column[of_input[used]] = used
    return column


def _counts(target: ad.AnnData, table: CellCounts) -> sparse.csr_matrix:
    """Raw counts (N, n_var) over all genes of `target`, those outside of the vocabulary included."""
    matrix = table.matrix
    if table.counts_from == "raw.X":
        where = target.raw.var_names.get_indexer(target.var_names)
        picked = sparse.csr_matrix(matrix)[:, np.maximum(where, 0)]
        return sparse.csr_matrix(picked.multiply(where >= 0)).astype(np.float32)
    return sparse.csr_matrix(matrix).astype(np.float32)


def _levels(target: ad.AnnData, table: CellCounts, column: np.ndarray, model: Any) -> sparse.csr_matrix:
    """Levels (N, n_var) of what was counted, by the range of all of a cell's counts of the model's genes.

    The model may have read other levels: it is shown neither what is hidden nor genes that are noise.
    """
    known = np.flatnonzero(column >= 0)
    place = sparse.csr_matrix(
        (np.ones(len(known), np.uint8), (known, column[known])), shape=(len(column), target.n_vars)
    )
    blocks = []
    for start in range(0, table.n_cells, _BLOCK):
        counts = table.read(np.arange(start, min(start + _BLOCK, table.n_cells)))
        blocks.append(sparse.csr_matrix(bin_counts(counts, num_bins=model.config.num_bins).tokens) @ place)
    return sparse.vstack(blocks).tocsr()
