"""`sct.tl.perturb`: knock out genes in silico, and measure how much the embeddings of the cells change."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import false_discovery_control

from sct import families, messages
from sct.checks import check_at_least, check_choice, check_distinct, check_not_empty, check_type
from sct.data.bag_order import WINDOW
from sct.data.cells import CellCounts
from sct.data.class_prior import ClassPrior
from sct.errors import DataError
from sct.inference import inputs
from sct.inference.bags import BagReader, plan_bags
from sct.progress import progress
from sct.tl.embedding import Contexts
from sct.tl.imputation import predict_genes

MODES, METRICS = ("zero", "mask"), ("cosine", "euclidean")
# Largest fraction of the measured genes that `targets` may hide from the model at once.
TARGET_SHARE = 0.2
# Random genes are drawn from this many times as many genes with the most similar expression frequency. Genes whose
# frequency differs by more than the tolerance are used only if there are too few others.
_POOL, _TOLERANCE = 3, 0.05


def perturb(
    adata: ad.AnnData,
    model: inputs.ModelLike,
    genes: Iterable[str | Iterable[str]],
    *,
    mode: Literal["zero", "mask"] = "zero",
    targets: Iterable[str] | None = None,
    metric: Literal["cosine", "euclidean"] = "cosine",
    n_random: int = 50,
    layer: str | None = None,
    key_added: str = "sct_perturb",
    batch_key: str | None = None,
    spatial_key: str | None = None,
    context: str = "tiles",
    cells_per_bag: int | None = None,
    batch_size: int | None = None,
    gene_column: str | None = None,
    duplicates: Literal["error", "sum"] = "error",
    seed: int = 0,
    copy: bool = False,
) -> ad.AnnData | None:
    """Knock out genes in silico, and compare the effect with that of random genes.

    Each entry of `genes` is one perturbation: a gene, or several genes that are knocked out together. A perturbation
    changes all cells. Its effect on a cell is the distance between the embeddings of the cell with and without the
    perturbation. With `targets`, the function also measures how the expected raw counts of other genes change.

    **Null distribution.** Genes that are expressed in many cells change an embedding more than rare genes. The effect
    of each perturbation is therefore compared with that of `n_random` different random perturbations of the same size.
    Each random gene replaces one gene of the perturbation. The random gene is drawn from the genes that are expressed
    in the most similar fraction of cells. Only this fraction is matched, but not, for example, the number of counts.
    The p-value is (1 + number of random perturbations with at least this effect) / (1 + `n_random`), so it is at least
    1 / (1 + `n_random`). The q-value is the p-value after Benjamini-Hochberg correction.

    A small p-value means that the effect is larger than that of most genes expressed in about as many cells. For the
    most frequent genes, such as housekeeping and ribosomal genes, few such genes exist. If `null_fraction` in the
    results is below `fraction_expressed`, a small p-value may only mean that the perturbation changes more cells than
    the random perturbations. A warning names such perturbations.

    The result describes the model, not the cells: a model predicts the consequences of a knock-out only as far as they
    are visible in the correlations that it learned. The model runs once for each perturbation and each random
    perturbation (twice with `targets`), so use a few hundred cells of one type or condition.

    Parameters
    ----------
    adata
        Raw counts (N, n_var), in memory or backed. X is never changed.
    model
        Result of `sct.load`, a path or a Hub id.
    genes
        Perturbations: ids or symbols of genes, or lists of these, such as ["GATA1", ["GATA1", "TAL1"]].
    mode
        "zero" sets the counts of the genes to zero before the model reads them. All models with cell embeddings can do
        this. "mask" hides the genes, so that the model does not know whether they are expressed. This needs a model
        that can impute genes.
    targets
        Genes whose expected counts are compared, at most a fifth of the measured genes. The target genes are hidden
        from the model and predicted with and without the perturbation, as in `sct.tl.impute`. This needs a model that
        can impute genes.
    metric
        Distance between embeddings: "cosine" (1 - cosine similarity) or "euclidean".
    n_random
        Number of random perturbations per perturbation; 0 for no p-values.
    layer, batch_key, spatial_key, context, cells_per_bag, batch_size, gene_column, duplicates
        See `sct.tl.embed`.
    key_added
        Key of the results:

        - `obsm[key_added]`: table (N, perturbations) with the effect on each cell. The columns are the perturbations;
          the genes of a list are joined by "+".
        - `uns[key_added]["effects"]`: table with one row per perturbation. `effect` is the mean effect over the cells,
          `fraction_expressed` is the fraction of cells that express at least one of the genes, and `null_fraction` is
          the mean of this fraction over the random perturbations. `null_mean` and `null_std` are the mean and standard
          deviation of the effects of the random perturbations. `p_value` and `q_value` are explained above.
        - `uns[key_added]["targets"]`, with `targets`: table with one row per perturbation and target gene. `expected`
          is the mean expected raw count without the perturbation. `change` is this mean with the perturbation minus
          `expected`. `p_value` is computed as above, from the number of random perturbations with at least this
          absolute change.
        - `uns[key_added]`: also the parameters.
    seed
        Random seed of the bags and of the random genes. The random genes of a perturbation do not depend on the other
        perturbations.
    copy
        If True, return a modified copy and leave `adata` unchanged.

    Raises
    ------
    ConfigError
        The model has no cell embeddings, `mode` or `targets` needs a model that can impute genes, `genes` or `targets`
        is not a list of names, or an option is out of range.
    DataError
        A gene is unknown or not measured, a cell expresses no genes except knocked-out ones, too few genes are left to
        draw random genes from, or `sct.tl.embed` cannot read the data.
    CheckpointError
        The model output is not finite. In this case nothing is written.

    Warns
    -----
    UserWarning
        `null_fraction` and `fraction_expressed` of a perturbation differ by more than 0.05.
    """
    inputs.check_table(adata, copy)
    check_choice("mode", mode, MODES)
    check_choice("metric", metric, METRICS)
    check_at_least("n_random", n_random, 0)
    handle = inputs.load_model(model)
    found = Contexts.of(
        adata, handle, layer=layer, batch_key=batch_key, spatial_key=spatial_key, context=context,
        cells_per_bag=cells_per_bag, batch_size=batch_size, gene_column=gene_column, duplicates=duplicates, seed=seed,
    )  # fmt: skip
    asked = _asked(genes, found.cells)
    listed = None if targets is None else inputs.gene_names("targets", targets)
    wanted = np.zeros(0, np.int64) if listed is None else _targets(listed, asked, found.cells)
    predictor = None
    if listed is not None:
        predictor = _Predictor(families.require(handle, "impute"), found, wanted, mode)
    elif mode == "mask":
        families.require(handle, "impute")
    expressed, detected = _detection(found.cells)
    largest = max(map(len, asked.values()))
    if (few := detected <= largest).any():
        raise DataError(
            f"{int(few.sum()):,} cells express at most {largest} genes of the model (first: row "
            f"{int(np.argmax(few))}), so a perturbation could remove all their counts: remove these cells."
        )
    draws = {
        name: _random_sets(name, members, expressed, wanted, n_random, seed)
        for name, members in asked.items()
    }
    # Perturbations can share random genes, which are then computed once.
    todo = dict.fromkeys([*asked.values(), *(one for several in draws.values() for one in several)])
    fractions = _fractions(asked, draws, found.cells)
    _warn_if_unmatched(fractions)

    cells = found.cells
    done: dict[tuple[int, ...], tuple[float, np.ndarray]] = {}  # mean effect, mean change of each target
    each: dict[tuple[int, ...], np.ndarray] = {}  # effect on each cell
    with progress("perturbing genes", len(todo) + 1, alone=True) as bar:
        before, counted = next(found.draws()), predictor() if predictor else None
        bar.update()
        for members in todo:
            mask = np.zeros(len(cells.vocabulary), bool)
            mask[list(members)] = True
            changed = found if mode == "mask" else dataclasses.replace(found, cells=cells.without(mask))
            after = next(changed.draws(mask) if mode == "mask" else changed.draws())
            effect = _distance(before, after, metric)
            change = np.zeros(0)
            if predictor is not None and counted is not None:
                change = (predictor(members, changed.cells) - counted).mean(axis=0, dtype=np.float64)
            done[members] = float(effect.mean(dtype=np.float64)), change
            if members in asked.values():
                each[members] = effect
            bar.update()

    target = inputs.output_adata(adata, copy)
    target.obsm[key_added] = pd.DataFrame(
        {name: each[members] for name, members in asked.items()}, index=target.obs_names
    )
    record = dict(
        inputs.record(
            handle, cells, **found.settings, mode=mode, metric=metric, n_random=n_random,
            genes=np.asarray(list(asked), dtype=str),
        )
    )  # fmt: skip
    record["effects"] = _effects(asked, draws, done, fractions)
    if listed is not None and counted is not None:
        record["targets"] = _changes(asked, draws, done, listed, counted.mean(axis=0, dtype=np.float64))
    inputs.keep_scales(target, cells.sections, batch_key, spatial_key)
    target.uns[key_added] = record
    return target if copy else None


def _asked(genes: Any, cells: CellCounts) -> dict[str, tuple[int, ...]]:
    """Return the perturbations, as a dict from each name to the sorted vocabulary positions of its genes."""
    check_type("genes", genes, (str, Iterable), "a list of gene names")
    listed = [genes] if isinstance(genes, str) else list(genes)
    check_not_empty("genes", listed)
    sets = [inputs.gene_names("an entry of genes", each) for each in listed]
    made: dict[str, tuple[int, ...]] = {}
    names = []
    for each in sets:
        check_not_empty("an entry of genes", each)
        names.append("+".join(map(str, each)))
        made[names[-1]] = tuple(sorted({int(at) for at in _find(each, cells)}))
    check_distinct("genes", names)
    return made


def _find(names: Sequence[str], cells: CellCounts) -> np.ndarray:
    """Return the vocabulary positions of genes; raise `DataError` if a gene is unknown or was not measured."""
    found = cells.vocabulary.find(list(names))
    lacking = [name for name, at in zip(names, found.tolist(), strict=True) if not cells.measured[at]]
    if lacking:
        raise DataError(
            f"adata has no counts of {len(lacking):,} of the genes (first: {lacking[0]!r}), so they cannot be "
            "perturbed or predicted: leave out these genes."
        )
    return found


def _targets(names: Sequence[str], asked: dict[str, tuple[int, ...]], cells: CellCounts) -> np.ndarray:
    """Return the positions of the target genes in the vocabulary."""
    check_not_empty("targets", names)
    check_distinct("targets", names)
    found = _find(names, cells)
    perturbed = {at for members in asked.values() for at in members}
    both = [name for name, at in zip(names, found.tolist(), strict=True) if at in perturbed]
    if both:
        raise DataError(
            f"targets contains {both[0]!r}, but this gene is also perturbed: remove the gene from targets or genes."
        )
    most = int(TARGET_SHARE * cells.measured.sum())
    if len(names) > most:
        raise DataError(
            f"targets has {len(names):,} genes, but at most {most:,} (a fifth of the measured genes) can be hidden at "
            "once: pass fewer genes."
        )
    return found


def _detection(cells: CellCounts) -> tuple[np.ndarray, np.ndarray]:
    """Return the fraction of cells that express each gene (G,), and the number of genes that each cell expresses."""
    of_genes, of_cells = np.zeros(len(cells.vocabulary)), np.zeros(cells.n_cells, np.int64)
    for start in range(0, cells.n_cells, WINDOW):
        rows = np.arange(start, min(start + WINDOW, cells.n_cells))
        block = cells.read(rows)
        of_genes += block.getnnz(axis=0)
        of_cells[rows] = block.getnnz(axis=1)
    return of_genes / cells.n_cells, of_cells


def _random_sets(
    name: str, members: tuple[int, ...], expressed: np.ndarray, targets: np.ndarray, n_random: int, seed: int
) -> list[tuple[int, ...]]:
    """Draw distinct random sets of genes.

    Each random gene is expressed in nearly the same fraction of cells as the gene that it replaces.
    """
    free = np.flatnonzero(expressed > 0)
    free = free[~np.isin(free, [*members, *targets.tolist()])]
    needed = n_random + len(members) - 1
    if n_random and len(free) < needed:
        raise DataError(
            f"n_random is {n_random}, but only {len(free):,} other genes are expressed: set n_random to at most "
            f"{max(0, len(free) - len(members) + 1)}."
        )
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    replacements = []
    for member in members:
        shuffled = rng.permutation(free)  # genes with equal fractions are in random order
        gaps = np.abs(expressed[shuffled] - expressed[member])
        nearest = np.argsort(gaps, kind="stable")[: _POOL * max(needed, 1)]
        similar = int((gaps[nearest] <= _TOLERANCE).sum())
        replacements.append(rng.permutation(shuffled[nearest[: max(needed, similar)]]))
    sets: dict[tuple[int, ...], None] = {}
    for draw in range(n_random):
        chosen: list[int] = []
        for number, candidates in enumerate(replacements, 1):
            others = (gene for gene in np.roll(candidates, -draw).tolist() if gene not in chosen)
            if number == len(members):
                # The pool is large enough that one of its genes completes a new set.
                chosen.append(next(gene for gene in others if tuple(sorted([*chosen, gene])) not in sets))
            else:
                chosen.append(next(others))
        sets[tuple(sorted(chosen))] = None
    return list(sets)


def _fractions(
    asked: dict[str, tuple[int, ...]], draws: dict[str, list[tuple[int, ...]]], cells: CellCounts
) -> dict[str, tuple[float, float]]:
    """For each perturbation, return two fractions of cells, as a dict by name.

    The first is the fraction of cells that express at least one gene of the perturbation. The second is the mean of the
    same fraction over the random sets, or NaN if there are no random sets.
    """
    sets = [one for name in asked for one in (asked[name], *draws[name])]
    genes = np.array([gene for one in sets for gene in one])
    of_set = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    member = sparse.csr_matrix(
        (np.ones(len(genes), np.float32), (genes, of_set)), (len(cells.vocabulary), len(sets))
    )
    express = np.zeros(len(sets))
    for start in range(0, cells.n_cells, WINDOW):
        block = sparse.csr_matrix(cells.read(np.arange(start, min(start + WINDOW, cells.n_cells))))
        express += (block @ member).getnnz(axis=0)
    found, at = {}, 0
    for name in asked:
        own, *random = (express[at : at + 1 + len(draws[name])] / cells.n_cells).tolist()
        found[name] = own, float(np.mean(random)) if random else float("nan")
        at += 1 + len(draws[name])
    return found


def _warn_if_unmatched(fractions: dict[str, tuple[float, float]]) -> None:
    """Warn if the random genes of a perturbation are expressed in clearly more or fewer cells than its own genes."""
    gaps = {name: abs(own - null) for name, (own, null) in fractions.items()}
    unmatched = [name for name, gap in gaps.items() if gap > _TOLERANCE]
    if unmatched:
        worst = max(unmatched, key=gaps.__getitem__)
        own, null = fractions[worst]
        messages.warn(
            f"for {len(unmatched):,} of {len(fractions):,} perturbations, too few other genes are expressed in "
            f"about as many cells as the perturbed genes. The difference is largest for {worst!r}, which is expressed "
            f"in {own:.1%} of the cells, while its random genes are expressed in {null:.1%}. The p-values of these "
            "perturbations are too small if the random genes are rarer, and too large if the random genes are more "
            "frequent: compare fraction_expressed and null_fraction, or set n_random lower."
        )


def _distance(before: np.ndarray, after: np.ndarray, metric: str) -> np.ndarray:
    """Return the distance between two embeddings (N, D) of each cell, float32 (N,); exactly 0 for equal embeddings."""
    one, other = before.astype(np.float64), after.astype(np.float64)
    if metric == "cosine":
        # Half the squared distance of unit vectors is 1 - cosine similarity, without its cancellation near 0.
        one, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (one, other))
        return (((one - other) ** 2).sum(axis=1) / 2).astype(np.float32)
    return np.linalg.norm(one - other, axis=1).astype(np.float32)


class _Predictor:
    """Predict the expected counts (N, T) of the target genes, which are hidden from the model."""

    def __init__(self, reader: BagReader, found: Contexts, targets: np.ndarray, mode: str):
        self.reader, self.found, self.targets, self.mode = reader, found, targets, mode
        self.prior = ClassPrior.of(found.model.data)
        self.prior.warn()
        settings = found.settings
        self.orders = [
            plan_bags(part, settings["cells_per_bag"], settings["seed"], found.context)
            for part in found.cells.sections
        ]

    def __call__(self, members: tuple[int, ...] = (), cells: CellCounts | None = None) -> np.ndarray:
        """Return the expected counts of the targets; with mode="mask", the genes `members` are hidden as well."""
        asked = self.targets
        if self.mode == "mask":
            asked = np.concatenate([asked, np.asarray(members, np.int64)])
        expected = predict_genes(
            self.reader,
            self.prior,
            self.found.cells if cells is None else cells,
            self.orders,
            asked,
            self.found.batch_size,
        )
        return expected[:, : len(self.targets)]


def _p_value(observed: Any, null: np.ndarray) -> Any:
    """Return the p-value of each observed effect.

    `null` (n_random, ...) holds the effects of the random perturbations.
    """
    if not len(null):
        return np.full(np.shape(observed), np.nan)
    return (1 + (null >= observed).sum(axis=0)) / (1 + len(null))


def _q_values(p_values: np.ndarray) -> np.ndarray:
    return p_values if np.isnan(p_values).any() else false_discovery_control(p_values)


def _effects(
    asked: dict[str, tuple[int, ...]],
    draws: dict[str, list[tuple[int, ...]]],
    done: dict[tuple[int, ...], tuple[float, np.ndarray]],
    fractions: dict[str, tuple[float, float]],
) -> pd.DataFrame:
    """Return a table of the effects on the embeddings, with one row per perturbation."""
    rows = []
    for name, members in asked.items():
        null = np.array([done[one][0] for one in draws[name]])
        rows.append(
            {
                "effect": done[members][0],
                "fraction_expressed": fractions[name][0],
                "null_fraction": fractions[name][1],
                "null_mean": null.mean() if len(null) else np.nan,
                "null_std": null.std() if len(null) else np.nan,
                "p_value": float(_p_value(done[members][0], null)),
            }
        )
    table = pd.DataFrame(rows, index=pd.Index(asked, name="perturbation", dtype=object))
    table["q_value"] = _q_values(table["p_value"].to_numpy())
    return table


def _changes(
    asked: dict[str, tuple[int, ...]],
    draws: dict[str, list[tuple[int, ...]]],
    done: dict[tuple[int, ...], tuple[float, np.ndarray]],
    targets: Sequence[str],
    expected: np.ndarray,
) -> pd.DataFrame:
    """Return a table of the changes of expected counts, with one row per perturbation and target gene."""

    def parts() -> Iterator[pd.DataFrame]:
        for name, members in asked.items():
            change = done[members][1]
            null = np.abs(np.array([done[one][1] for one in draws[name]]).reshape(-1, len(targets)))
            yield pd.DataFrame(
                {
                    "perturbation": name, "gene": list(targets), "expected": expected, "change": change,
                    "p_value": _p_value(np.abs(change), null),
                }
            )  # fmt: skip

    table = pd.concat(list(parts()), ignore_index=True)
    table["q_value"] = _q_values(table["p_value"].to_numpy())
    return table.set_axis(table.index.astype(str), axis=0)
