"""Define which genes of a cell a model reads, and the kind of their expression values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sct.checks import check_at_least, check_choice
from sct.data.cell_values import VALUES
from sct.errors import ConfigError

GENES = ("all", "expressed", "top", "sampled", "listed", "hvg")
EXPRESSED = ("expressed", "top", "sampled")  # only expressed genes of a cell, max_genes at most
FIXED = ("listed", "hvg")  # every cell has the same genes, expressed or not


@dataclasses.dataclass(frozen=True)
class CellOptions:
    """Options for converting cells to training records (model inputs of one cell).

    Parameters
    ----------
    num_bins
        Number of bins for non-zero values (10 in the ZerOmics paper); zero is bin 0. With `values="levels"`, there are
        `num_bins` - 1 bins for non-zero values. The maximum of `num_bins` is 65,533 for "quantiles" and 253 for
        "levels".
    max_genes
        Maximum number of genes of a cell that the model reads; 0 for all genes of the vocabulary.
    genes
        Which genes of a cell the model reads. "all": all genes of the vocabulary, in the order of the vocabulary.
        "expressed": all expressed genes; a cell with more than `max_genes` expressed genes is an error. "top": the
        `max_genes` most highly expressed genes; cell, gene and `seed` determine the order of genes with equal counts.
        "sampled": `max_genes` random expressed genes. "listed": the genes of a fixed list from the caller, whether or
        not the cell expresses them. "hvg": `max_genes` highly variable genes, whether or not the cell expresses them; a
        task selects these genes from the training cells (`sct.data.gene_selection.hvg_of`) and saves them with the
        model. "" (the default) means "top" if `max_genes` is set, otherwise "all".
    values
        Kind of expression values: a name in `sct.data.cell_values.VALUES`.
    """

    num_bins: int = 10
    max_genes: int = 0
    genes: str = ""
    values: str = "quantiles"

    def __post_init__(self) -> None:
        # Bins, including zero and MASK, must fit into uint8 or uint16.
        check_at_least("num_bins", self.num_bins, 1, most=65_533 if self.values == "quantiles" else 253)
        check_at_least("max_genes", self.max_genes, 0)
        for name, known in (("genes", ("", *GENES)), ("values", tuple(VALUES))):
            check_choice(name, getattr(self, name), known)
        if self.values == "levels" and self.num_bins < 2:
            raise ConfigError(
                "num_bins is 1, but must be at least 2 with values='levels': increase num_bins."
            )
        if (self.choice in ("all", "listed")) == bool(self.max_genes):
            needed = "0" if self.max_genes else "at least 1"
            raise ConfigError(
                f"max_genes is {self.max_genes}, but must be {needed} with genes={self.choice!r}: change max_genes, "
                "or choose another value for genes."
            )

    @classmethod
    def of(cls, num_bins: int, data: Any) -> CellOptions:
        """Make `CellOptions` from a number of bins and the data options of a configuration or a model folder."""
        given = data if isinstance(data, Mapping) else vars(data)
        named = {name: given[name] for name in ("genes", "values") if name in given}
        return cls(num_bins, int(given["max_genes"]), **named)

    @classmethod
    def of_tokens(cls, num_values: int, embeds_bins: bool, data: Any) -> CellOptions:
        """Make the options of a model that counts zero as one of its values, such as the cell encoder.

        Parameters
        ----------
        num_values
            Number of values of a gene, zero included.
        embeds_bins
            Whether the model has an embedding of each bin, and so cannot read values that are not bins.
        data
            See `of`.

        Raises
        ------
        ConfigError
            The model reads bins, but the values are not bins.
        """
        made = cls.of(2, data)
        if made.name == "values" and embeds_bins:
            raise ConfigError(
                f"model.values is 'category', but data.values is {made.values!r}: set data.values to quantiles, or "
                "model.values to continuous."
            )
        # Only levels count zero as a bin.
        bins = num_values if made.values == "levels" else max(num_values - 1, 1)
        return dataclasses.replace(made, num_bins=bins)

    def record(self) -> dict[str, Any]:
        """Return the options as a dict for a model folder. `CellOptions.of` reads this dict."""
        return {"max_genes": self.max_genes, "genes": self.genes, "values": self.values}

    @property
    def choice(self) -> str:
        """Return the gene selection that is in effect, one of `GENES`."""
        return self.genes or ("top" if self.max_genes else "all")

    @property
    def name(self) -> str:
        """Return the name of the array that holds the expression values of a record: "values" or "bins"."""
        return "values" if self.values == "log1p" else "bins"
