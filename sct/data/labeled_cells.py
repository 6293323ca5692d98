"""Hold cells with labels, divided into training, validation and test cells, for fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from sct.checks import check_at_least, check_choice, check_share
from sct.data.cells import CellCounts, Section
from sct.data.genes.alignment import check_shared
from sct.data.genes.vocabulary import GeneVocabulary
from sct.data.store import SPLITS, Store
from sct.errors import ConfigError, DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
MISSING = -1  # code of a cell whose label is missing, or is the label of no training cell
_ORIGIN = "sct_split"  # column with the split of the study of a store
_VALIDATION_SHARE = 0.1  # share of the training cells, where there are no donors


@dataclasses.dataclass(frozen=True)
class SplitOptions:
    """Options that divide labeled cells into training, validation and test cells.

    By default, 80% of the donors are training donors, and the others are test donors. One of the training donors gives
    the validation cells (scPEFT paper, "Data preparation"). Without a column of donors, cells are divided at random
    within each label.

    Parameters
    ----------
    split_key
        Column of `obs` that gives the split of each cell: "train", "validation" (or "valid", "val") and "test". Cells
        with other values are not used. Without validation cells, a tenth of the training cells is used for validation.
    donor_key
        Column of `obs` with the donor of each cell; "" divides cells at random.
    test_fraction
        Share of the donors, or of the cells, that is used for the test. 0: no test.
    split_seed
        Seed of the random division.
    shots
        Largest number of training cells per label, drawn at random; 0 for all. The other training cells are not used.
    """

    split_key: str = ""
    donor_key: str = ""
    test_fraction: float = 0.2
    split_seed: int = 0
    shots: int = 0

    def __post_init__(self) -> None:
        check_share("test_fraction", self.test_fraction, one=False)
        check_at_least("shots", self.shots, 0)


_SPELLINGS = {
    "train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "test": TEST,
    "testing": TEST,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotatedCells:
    """Cells with labels and splits.

    Attributes
    ----------
    cells
        Counts of the cells. Each split is a section.
    obs
        Metadata of the cells.
    label_key
        Column of `obs` with the labels.
    names
        Labels of the training cells, sorted: the classes (C).
    codes
        Class of each cell, int32 (N,); `MISSING` if the label is missing or is the label of no training cell.
    rows
        Row numbers of the cells of each split that have a label, ascending.
    how
        Sentence that says how the cells were divided.
    """

    cells: CellCounts
    obs: pd.DataFrame
    label_key: str
    names: tuple[str, ...]
    codes: np.ndarray
    rows: Mapping[str, np.ndarray]
    how: str

    @classmethod
    def of(
        cls,
        adata: ad.AnnData,
        vocabulary: GeneVocabulary,
        label_key: str,
        options: SplitOptions,
        *,
        layer: str | None = None,
        gene_column: str | None = None,
        duplicates: Literal["error", "sum"] = "error",
    ) -> AnnotatedCells:
        """Divide the labeled cells of an AnnData, and align their counts to a vocabulary.

        Raises
        ------
        ConfigError, DataError
            A column is missing, fewer than two labels have training cells, a split is empty, no validation cell has a
            label of the training cells, or the counts cannot be read (`CellCounts`).
        """
        labels = _column(adata.obs, label_key, "label_key")
        is_labeled = labels.notna().to_numpy()
        texts = np.array(labels.astype(str), dtype=object)
        texts[~is_labeled] = None
        split, how = divide(adata.obs, texts, options)
        rows = {name: np.flatnonzero((split == name) & is_labeled) for name in SPLITS}
        names = tuple(sorted(set(texts[rows[TRAIN]])))
        if len(names) < 2:
            what = f"only the label {names[0]!r}" if names else "no label"
            raise DataError(
                f"the training cells have {what} in obs[{label_key!r}], but a classifier needs at least two labels: "
                "use another column, or divide the cells in another way."
            )
        for name in (VALIDATION, *((TEST,) if options.test_fraction and not options.split_key else ())):
            if not len(rows[name]):
                raise DataError(
                    f"the {name} split has no labeled cells: change donor_key, split_key or the seed of the split."
                )
        places = {name: number for number, name in enumerate(names)}
        codes = np.asarray(
            [
                places.get(text, MISSING) if known else MISSING
                for text, known in zip(texts, is_labeled, strict=True)
            ],
            np.int32,
        )
        if not (codes[rows[VALIDATION]] != MISSING).any():
            raise DataError(
                "no validation cell has a label that a training cell has, but the best epoch is chosen by these cells: "
                "change donor_key, split_key or the seed of the split."
            )
        # Cells without a label or split are in no section that is read.
        used = np.zeros(adata.n_obs, bool)
        parts = [rows[name] for name in SPLITS if len(rows[name])]
        for part in parts:
            used[part] = True
        rest = [np.flatnonzero(~used)] if not used.all() else []
        sections = [Section("", part) for part in [*parts, *rest]]
        cells = CellCounts(
            adata, vocabulary, sections, layer=layer, gene_column=gene_column, duplicates=duplicates
        )
        empty = used & (cells.cell_totals == 0)
        if empty.any():
            raise DataError(
                f"{int(empty.sum()):,} labeled cells have no counts of the model's genes (first: row "
                f"{int(np.argmax(empty))}), but every cell needs some counts of these genes: remove these cells."
            )
        unseen = sorted(
            {texts[row] for name in (VALIDATION, TEST) for row in rows[name] if codes[row] == MISSING}
        )
        if unseen:
            how += (
                f" {len(unseen)} labels have no training cell and cannot be predicted ({', '.join(unseen[:5])}"
                f"{', ...' if len(unseen) > 5 else ''}): test cells with these labels count as wrong."
            )
        return cls(cells, adata.obs, label_key, names, codes, rows, how)

    @classmethod
    def of_store(cls, store: Store, label_key: str, options: SplitOptions) -> AnnotatedCells:
        """Read the labeled cells of a store into memory, and divide them.

        If the store has test studies and `split_key` is not set, the studies decide which cells are test cells, and the
        validation studies decide which are validation cells. Only genes that all labeled studies measured are read.

        Raises
        ------
        ConfigError, DataError
            No study has the labels, the labeled studies share too few measured genes, or see `of`.
        """
        studies = [
            study for split in SPLITS for study in store.split(split) if label_key in study.obs_columns
        ]
        if not studies:
            raise ConfigError(
                f"data.label_key is {label_key!r}, but no study of {store.path} has this column in obs: set "
                "data.label_key to a column with labels."
            )
        tables, matrices = [], []
        for study in studies:
            study.check_counts()
            matrices.append(study.read(0, study.n_cells))
            table = study.obs().assign(**{_ORIGIN: study.split, "sct_study": study.name})
            # Cells of different studies often have the same names.
            tables.append(table.set_axis([f"{study.name}:{name}" for name in table.index]))
        obs = pd.concat(tables)
        # A gene that only some studies measured would be zero in the cells of the others.
        panels = np.asarray([study.measured for study in studies])
        measured = np.asarray(panels.all(axis=0))
        check_shared(
            int(measured.sum()), int(panels.sum(axis=1).min()), "the labeled studies of the store", "left out"
        )
        partly = int((panels.any(axis=0) & ~measured).sum())
        var = pd.DataFrame(
            {"measured": measured, "total_counts": np.zeros(len(measured))},
            index=list(store.vocabulary.ensembl_ids),
        )
        counts = sparse.csr_matrix(sparse.vstack(matrices))
        if partly:
            counts.data[~measured[counts.indices]] = 0
            counts.eliminate_zeros()
        adata = ad.AnnData(counts, obs=obs, var=var)
        if not options.split_key and store.split(TEST):
            options = dataclasses.replace(options, split_key=_ORIGIN)
        made = cls.of(adata, store.vocabulary, label_key, options)
        if not partly:
            return made
        how = f"{made.how} {partly:,} genes that not all labeled studies measured are not read."
        return dataclasses.replace(made, how=how)

    def labels(self, split: str) -> np.ndarray:
        """Return the true labels of the cells of a split, str (n,)."""
        return self.obs[self.label_key].astype(str).to_numpy(object)[self.rows[split]]

    def counts(self, split: str) -> sparse.csr_matrix:
        """Return the raw counts of the cells of a split, CSR (n, G)."""
        return self.cells.read(self.rows[split])


def _column(obs: pd.DataFrame, name: str, what: str) -> pd.Series:
    check_choice(what, name, obs.columns, error=DataError, advice="set it to a column of obs")
    return obs[name]


def divide(obs: pd.DataFrame, labels: np.ndarray, options: SplitOptions) -> tuple[np.ndarray, str]:
    """Divide cells into splits.

    Parameters
    ----------
    obs
        Metadata of the cells (N rows).
    labels
        Labels, (N,); None for cells without a label.
    options
        See `SplitOptions`.

    Returns
    -------
    The split of each cell, (N,), "" for cells that are not used; and a sentence that says how they were divided.

    Raises
    ------
    DataError
        A column is missing, or there are too few donors.
    """
    rng = np.random.default_rng(options.split_seed)
    labeled = pd.Series(labels, dtype=object).notna().to_numpy()
    labels = np.array(labels, dtype=object)
    labels[~labeled] = None  # other missing values, such as pandas.NA, cannot be compared
    split, how = _divided(obs, labels, labeled, options, rng)
    if options.shots:
        for label in sorted(set(labels[split == TRAIN])):
            rows = np.flatnonzero((split == TRAIN) & (labels == label))
            split[rng.permutation(rows)[options.shots :]] = ""
        how += f" Of the training cells, at most {options.shots} of each label are used, drawn at random."
    return split, how


def _divided(
    obs: pd.DataFrame,
    labels: np.ndarray,
    labeled: np.ndarray,
    options: SplitOptions,
    rng: np.random.Generator,
) -> tuple[np.ndarray, str]:
    if options.split_key:
        return _given(obs, labels, labeled, options, rng)
    if options.donor_key:
        donors = _column(obs, options.donor_key, "donor_key")
        known = labeled & donors.notna().to_numpy()
        names = sorted(set(donors[known].astype(str)))
        if len(names) > 2:
            split, how = _by_donor(donors.astype(str).to_numpy(object), known, names, options, rng)
            return split, how + _without_donor(int((labeled & ~known).sum()))
        how = f"obs[{options.donor_key!r}] has only {len(names)} donor{'s' * (len(names) != 1)}, so cells"
    else:
        how = "Cells"
    split = np.full(len(obs), "", dtype=object)
    split[labeled] = TRAIN
    _draw(split, labels, options.test_fraction, TEST, rng)
    _draw(split, labels, _VALIDATION_SHARE, VALIDATION, rng)
    share = f"{1 - options.test_fraction:.0%} training and {options.test_fraction:.0%} test cells"
    how = (
        f"{how} were divided at random within each label (seed {options.split_seed}): {share}; "
        f"{_VALIDATION_SHARE:.0%} of the training cells are validation cells. Cells of one donor are therefore in "
        "several splits, which makes the test easier than one on new donors."
    )
    return split, how


def _without_donor(number: int) -> str:
    """Return the sentence about the cells that are left out because their donor is missing."""
    if not number:
        return ""
    return f" Labeled cells without a donor are not used ({number:,})."


def _draw(split: np.ndarray, labels: np.ndarray, share: float, name: str, rng: np.random.Generator) -> None:
    """Move a share of the training cells of each label to another split; at least one training cell stays."""
    for label in sorted(set(labels[split == TRAIN])):
        rows = np.flatnonzero((split == TRAIN) & (labels == label))
        number = min(max(round(share * len(rows)), int(share > 0 and len(rows) > 2)), len(rows) - 1)
        split[rng.permutation(rows)[:number]] = name


def _by_donor(
    donors: np.ndarray, known: np.ndarray, names: list[str], options: SplitOptions, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    order = rng.permutation(len(names))
    tested = max(1, round(options.test_fraction * len(names))) if options.test_fraction else 0
    tested = min(tested, len(names) - 2)
    test, (validation, *train) = [names[i] for i in order[:tested]], [names[i] for i in order[tested:]]
    split = np.full(len(donors), "", dtype=object)
    for name, chosen in ((TEST, test), (VALIDATION, [validation]), (TRAIN, train)):
        split[known & np.isin(donors, chosen)] = name
    how = (
        f"Cells were divided by donor (obs[{options.donor_key!r}], seed {options.split_seed}): {len(train)} training "
        f"donors, the validation donor {validation}, {len(test)} test donors ({', '.join(sorted(test)[:10])}"
        f"{', ...' if len(test) > 10 else ''})."
    )
    return split, how


def _given(
    obs: pd.DataFrame,
    labels: np.ndarray,
    labeled: np.ndarray,
    options: SplitOptions,
    rng: np.random.Generator,
) -> tuple[np.ndarray, str]:
    values = _column(obs, options.split_key, "split_key").astype(str).str.lower()
    split = np.asarray([_SPELLINGS.get(value, "") for value in values], dtype=object)
    split[~labeled] = ""
    if not (split == TRAIN).any():
        raise DataError(
            f"obs[{options.split_key!r}] gives no labeled cell to training (values: "
            f"{', '.join(sorted(set(values))[:5])}), but the values must be train, validation and test: change the "
            "column, or split_key."
        )
    from_studies = options.split_key == _ORIGIN
    how = f"obs[{options.split_key!r}] gives the split."
    if from_studies:
        how = "The studies of the store decide the split."
    donors = _column(obs, options.donor_key, "donor_key") if options.donor_key else None
    if not (split == VALIDATION).any():
        known = np.zeros(len(obs), bool) if donors is None else donors.notna().to_numpy()
        names = [] if donors is None else sorted(set(donors.astype(str)[(split == TRAIN) & known]))
        if donors is not None and len(names) > 1:
            chosen = names[int(rng.integers(len(names)))]
            # A cell without a donor may come from the validation donor.
            without = (split == TRAIN) & ~known
            split[without] = ""
            split[(split == TRAIN) & (donors.astype(str) == chosen).to_numpy()] = VALIDATION
            how += f" The training donor {chosen} is used for validation." + _without_donor(
                int(without.sum())
            )
        else:
            _draw(split, labels, _VALIDATION_SHARE, VALIDATION, rng)
            how += f" {_VALIDATION_SHARE:.0%} of the training cells, drawn within each label, are used for validation."
    return split, how
