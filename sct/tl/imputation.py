"""`sct.tl.impute`: predict genes or whole cells."""

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
# Suffixes of the result names.
RESULTS = ("expected", "level", "probability")
# Maximum fraction of the cells of a bag that are hidden at once when whole cells are imputed: 10 of 50.
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
    """Impute genes or whole cells from the rest of the data (sCT paper, section 4).

    The requested values are hidden from the model, whether they were measured or not. The model predicts a probability
    for each expression level. The expected raw count is the sum over levels of probability x mean count of the level.
    The mean count of an expression level is computed from the visible genes of the cell. If a cell has no visible
    genes, the mean count is averaged over the visible cells of the bag. The mean count of level 1 is computed
    separately for each gene, see `sct.data.tokenize.expected_counts`.

    Training masks expressed genes more often than unexpressed genes. The predicted probabilities are corrected for this
    bias, unless the training loss already corrects it (`sct.data.class_prior`).

    Results with `key_added="sct"`:

    - `layers["sct_expected"]` (N, n_var) float32 CSR: expected raw count of imputed values, raw count of all others.
    - `layers["sct_level"]` (N, n_var) uint8 CSR: most likely expression level of imputed values, observed level of all
      others (0 unexpressed, 1 lowest, ...). The levels of a cell divide the range of all its counts. Genes that the
      model does not know have no level.
    - `layers["sct_probability"]` (N, n_var) float32 CSR: probability that the raw count is at least 1; 1 or 0 for
      values that were not imputed.
    - `obsm["sct_expected"]`, `obsm["sct_level"]` and `obsm["sct_probability"]`: tables (N, genes) for genes that have
      no column or several columns in `adata`, and for a backed `adata`. Columns have the requested names. Cells that
      were not requested have NaN.
    - `uns["sct"]`: what was imputed (`genes`, `cells`, and `var_names` of the genes in layers), and the parameters.

    X is never changed. Results of an earlier call with the same `key_added` are removed. The bags are the same as in
    `sct.tl.embed`. If whole cells are imputed, at most a fifth of the cells of a bag are hidden, but at least one cell,
    even if the bag has fewer than five. The other cells of the bag are visible: random cells or, with spatial
    positions, the nearest cells.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed.
    model
        Result of `sct.load`, a path or a Hub id.
    genes
        Ids or symbols of genes that the model knows; they do not have to be in `adata`. "missing" imputes all genes of
        the model that `adata` lacks; the result can have N x thousands of values.
    cells
        Cells to impute: names, row numbers, or a mask (N,). Without `genes`, all genes of `adata` are imputed in these
        cells. With `genes`, only these genes are imputed in these cells.
    layer, batch_key, spatial_key, cells_per_bag, batch_size, gene_column, duplicates, seed, copy
        See `sct.tl.embed`.
    key_added
        Prefix of the names of the results.

    Raises
    ------
    ConfigError
        Neither `genes` nor `cells` is set.
    DataError
        A gene or cell is unknown, no visible cell is left, or `sct.tl.embed` cannot read the data.
    CheckpointError
        The model output is not finite. In this case nothing is written.
    """
    inputs.check_table(adata, copy)
    if genes is None and cells is None:
        raise ConfigError(
            '`genes` and `cells` are both missing: set genes=["CD3E", ...], genes="missing" for the genes that the '
            "panel lacks, or cells=..."
        )
    handle = inputs.load_model(model)
    reader: BagReader = families.require(handle, "impute")
    prior = ClassPrior.of(handle.data)
    prior.warn()
    size = reader.cells_per_bag(cells_per_bag)
    if adata.isbacked and cells is not None:
        raise DataError(
            "adata is backed, but the option cells=... needs an AnnData in memory: load adata with "
            "adata.to_memory(), or set only `genes`."
        )
    check_at_least("seed", seed, 0)
    chosen = None if cells is None else _rows(adata, cells)
    sections = inputs.sections(adata, batch_key, spatial_key)
    table = CellCounts(
        adata, handle.vocabulary, sections, layer=layer, gene_column=gene_column, duplicates=duplicates
    )
    if table.counts_from == "raw.X" and not (adata.var_names.is_unique and adata.raw.var_names.is_unique):
        raise DataError(
            "var_names or raw.var_names are not unique, so the genes of raw cannot be matched to var: call "
            "adata.var_names_make_unique(), and make the names in raw unique."
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
    """Group the cells of a section into bags for the imputation of whole cells.

    The mask `hidden` (n,) is True for the cells to impute. Return None if there are no cells to impute.
    """
    where = f" of {section.name}" if section.name else ""
    if not hidden.any():
        return None
    if hidden.all():
        raise DataError(
            f"all {len(hidden):,} cells{where} are selected for imputation, but some cells must stay "
            "visible: select fewer cells."
        )
    if cells_per_bag < 2:
        raise ConfigError(
            "`cells_per_bag` is 1, but imputing whole cells needs other cells in the bag: set "
            "`cells_per_bag` to 2 or more."
        )
    # A section can be smaller than a bag; most of its cells must stay visible too.
    most = max(1, int(HIDDEN_SHARE * min(cells_per_bag, len(hidden))))
    return masked_cell_order(section.rows, hidden, cells_per_bag, most, seed, section.places)


def _rows(adata: ad.AnnData, cells: Any) -> np.ndarray:
    """Convert names, row numbers or a mask of cells to a mask (N,)."""
    given = np.asarray(cells)
    mask = np.zeros(adata.n_obs, bool)
    if given.dtype == bool:
        check_shape("the mask of cells", given, ((adata.n_obs, "cells"),))
        mask = given.copy()
    elif given.dtype.kind in "iu":
        if given.size and not (given.min() >= 0 and given.max() < adata.n_obs):
            raise DataError(
                f"`cells` has row numbers from {given.min()} to {given.max()}, but adata has the rows 0 to "
                f"{adata.n_obs - 1}: use row numbers in this range."
            )
        mask[given] = True
    else:
        if not adata.obs_names.is_unique:
            raise DataError(
                "obs_names are not unique, so a name can mean several cells: call adata.obs_names_make_unique() if the "
                "repeated names are different cells."
            )
        found = adata.obs_names.get_indexer(np.atleast_1d(given).astype(str))
        if (found < 0).any():
            lost = np.atleast_1d(given)[found < 0]
            raise DataError(
                f"{len(lost):,} names in `cells` are not in obs_names (first: {str(lost[0])!r}): correct "
                "these names, or remove them from `cells`."
            )
        mask[found] = True
    if not mask.any():
        raise DataError(
            "`cells` selects no cell, but at least one is needed: pass the cells to impute, or "
            "leave `cells` out to impute genes in all cells."
        )
    return mask


def _genes(
    model: Any, table: CellCounts, column: np.ndarray, genes: str | Iterable[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return the vocabulary positions and the names of the genes to predict."""
    vocabulary = model.vocabulary
    if genes is None:
        wanted = np.flatnonzero(table.measured & (column >= 0))
        return wanted, [vocabulary.keys[gene] for gene in wanted]
    if isinstance(genes, str) and genes == MISSING:
        wanted = np.flatnonzero(~table.measured)
        if not len(wanted):
            raise DataError(
                'genes is "missing", but adata already has all genes of the model: set `genes` to a list of gene names.'
            )
        alone = [
            vocabulary.owners_of_symbol.get(vocabulary.symbols[gene]) == (gene,) for gene in wanted.tolist()
        ]
        return wanted, [
            vocabulary.symbols[gene] if unique else vocabulary.keys[gene]
            for gene, unique in zip(wanted.tolist(), alone, strict=True)
        ]
    listed = inputs.gene_names("genes", genes)
    return vocabulary.find(listed), listed


@dataclasses.dataclass(frozen=True)
class _Predictions:
    """Hold the predictions for n genes in m cells.

    Attributes
    ----------
    rows
        Row number of each cell, int (m,).
    values
        One array (m, n) for each suffix in `RESULTS`: expected counts (float32), levels (uint8), and probabilities of
        expression (float32).
    """

    rows: np.ndarray
    values: dict[str, np.ndarray]


def predict_genes(
    reader: BagReader,
    prior: ClassPrior,
    table: CellCounts,
    orders: list[BagOrder],
    genes: np.ndarray,
    batch_size: int | None = None,
) -> np.ndarray:
    """Return the expected counts of hidden genes in all cells, float32 (N, n).

    Parameters
    ----------
    reader, prior, table
        Object that runs the model over bags of cells, the correction for the masking rates of training, and the cells.
    orders
        Order of the cells in bags, one entry for each section (batch or slide).
    genes
        Positions of the hidden genes in the vocabulary (n,).
    batch_size
        See `impute`.
    """
    masked = np.isin(np.arange(len(table.vocabulary)), genes)
    everywhere = np.ones(table.n_cells, bool)
    found = _predict(reader, prior, table, list(orders), genes, everywhere, masked, batch_size)
    return found.values["expected"]


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
    """Predict the genes at the vocabulary positions `wanted`, in the cells for which the mask `chosen` is True."""
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
        if whole:  # as in training: genes that were not measured are not masked
            tokens[masked_slots] = np.where(
                bag["measured"] & (tokens[masked_slots] < config.num_bins), config.mask, tokens[masked_slots]
            )
        else:
            tokens[np.ix_(masked_slots, wanted)] = config.mask
        asked = np.zeros(most, np.int32)
        flat = (masked_slots[:, None] * config.num_genes + wanted).ravel()
        asked[: len(flat)] = flat
        return {"tokens": tokens, "positions": asked}

    # All bags use the size of the largest one, so that XLA compiles only one program.
    full = max(
        int(chosen[order.rows.reshape(-1, order.cells_per_bag)].sum(axis=1).max())
        for order in orders
        if order is not None
    )
    most = full * len(wanted)
    for one in reader.results(
        table, orders, ("logits",), "imputing cells", batch_size, inputs=masked, with_counts=True, masked_cells=chosen,
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
    """Write predictions to layers, or to obsm for genes that do not have exactly one column in `target`.

    Return a mask of the genes written to layers.
    """
    places = result.rows
    there = column[wanted] >= 0
    if target.isbacked:
        there[:] = False
    # An earlier call can have imputed other genes or cells.
    for name in (f"{key}_{ending}" for ending in result.values):
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
            if len(places) < target.n_obs:  # NaN for cells that were not requested
                whole = np.full((target.n_obs, whole.shape[1]), np.nan, np.float32)
                whole[places] = values[:, ~there]
            lacking = [gene for gene, inside in zip(names, there, strict=True) if not inside]
            target.obsm[name] = pd.DataFrame(whole, index=target.obs_names, columns=lacking)
    return there


def _columns(target: ad.AnnData, table: CellCounts) -> np.ndarray:
    """Return the column number in `target` of each vocabulary gene; -1 if the gene has no column or several columns."""
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
    """Return raw counts (N, n_var) of all genes of `target`, including genes outside the vocabulary."""
    matrix = table.matrix
    if table.counts_from == "raw.X":
        where = target.raw.var_names.get_indexer(target.var_names)
        picked = sparse.csr_matrix(matrix)[:, np.maximum(where, 0)]
        return sparse.csr_matrix(picked.multiply(where >= 0)).astype(np.float32)
    return sparse.csr_matrix(matrix).astype(np.float32)


def _levels(target: ad.AnnData, table: CellCounts, column: np.ndarray, model: Any) -> sparse.csr_matrix:
    """Return the expression level of each observed count, (N, n_var).

    The levels divide the range of the counts of a cell. This range is computed from the genes that the model knows.

    These levels may differ from those that the model reads, because the model reads neither hidden values nor genes
    below the noise threshold.
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
