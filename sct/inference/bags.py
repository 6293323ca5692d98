"""Run models that read cells in bags (sCT): an input is a bag of cells with the expression levels of all genes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from sct.checks import check_at_least, check_choice
from sct.data.bag_order import BagOrder, centered_order, random_order, tile_order
from sct.data.bags import BagOptions, BagSource
from sct.data.cells import CellCounts, CellStudy, Section
from sct.data.class_prior import ClassPrior
from sct.errors import ConfigError
from sct.inference.runner import Record, RecordOutputs, Runner
from sct.models.sct import level_probabilities
from sct.progress import progress
from sct.weights.pretrained import DATA_OPTIONS, Pretrained

CONTEXTS = ("tiles", "neighbors")
# Function of (bag, rows) that returns inputs to add or replace, without the batch axis.
PrepareInputs = Callable[[Mapping[str, np.ndarray], np.ndarray], dict[str, np.ndarray]]


def check_context(context: str, section: Section) -> None:
    """Raise `ConfigError` if `context` is unknown, or is "neighbors" although the cells have no spatial positions."""
    check_choice("context", context, CONTEXTS)
    if context != CONTEXTS[0] and section.places is None:
        raise ConfigError(
            f"context is {context!r}, but choosing the neighbors of a cell needs the positions of the cells: also set "
            f"`spatial_key`, or set context={CONTEXTS[0]!r}."
        )


def plan_bags(section: Section, cells_per_bag: int, seed: int, context: str = "tiles") -> BagOrder:
    """Group the cells of a section (a batch or slide) into bags.

    Cells without positions are grouped at random. With positions, each bag is a tile of the section. With
    `context="neighbors"`, each bag is a cell and its nearest cells.

    Raises
    ------
    ConfigError
        `context` is unknown, or is "neighbors" although the cells have no positions.
    """
    check_context(context, section)
    if section.places is None:
        return random_order(section.rows, cells_per_bag, seed)
    make = tile_order if context == "tiles" else centered_order
    return make(section.rows, section.places, cells_per_bag)


class BagReader:
    """Reader that runs a model on bags of cells, with the expression levels of all genes.

    Parameters
    ----------
    model
        Model whose configuration has `num_genes`, `num_bins` and `use_spatial`. Its outputs are `cell_embedding`
        (B, K, D) and, at the requested `positions`, `logits`.
    """

    in_bags = True
    readout = "cell_embedding"
    readouts: Mapping[str, str] = MappingProxyType({})

    def __init__(self, model: Pretrained):
        self.model = model

    def cells_per_bag(self, asked: int | None = None) -> int:
        """Return the number of cells per bag: `asked`, or by default the number used in training."""
        size = asked if asked is not None else self.model.data.get("cells_per_bag")
        size = DATA_OPTIONS["cells_per_bag"] if size is None else size
        check_at_least("cells_per_bag", size, 1)
        return int(size)

    def options(self, cells_per_bag: int, spatial: bool, with_counts: bool = False) -> BagOptions:
        """Return the options of the bags: the arguments, and for all other options the values from training."""
        config = self.model.config
        return BagOptions(
            cells_per_bag=cells_per_bag,
            num_positions=config.num_genes,
            num_bins=config.num_bins,
            noise_fraction=self.model.data.get("noise_fraction", DATA_OPTIONS["noise_fraction"]),
            spatial=config.use_spatial and spatial,
            with_counts=with_counts,
        )

    def probabilities(self, prior: ClassPrior) -> Any:
        """Return a function that computes expression level probabilities; see `sct.models.sct.level_probabilities`."""
        return level_probabilities(self.model.config, prior.offset)

    def results(
        self,
        cells: CellCounts,
        orders: Sequence[BagOrder | None] | None,
        names: Sequence[str],
        what: str,
        batch_size: int | None = None,
        seed: int = 0,
        inputs: PrepareInputs | None = None,
        with_counts: bool = False,
        masked_cells: np.ndarray | None = None,
        masked_genes: np.ndarray | None = None,
    ) -> Iterator[RecordOutputs]:
        """Run the model over all bags, with a progress bar; see `sct.inference.readers.CellReader`.

        Parameters
        ----------
        orders
            For each section (tissue slice or study), the order in which its cells are put into bags. None skips the
            section.
        inputs
            Function of (bag, rows) that returns model inputs, without the batch axis. These inputs are added to the
            usual inputs, or replace usual inputs with the same names.
        with_counts, masked_cells, masked_genes
            See `BagOptions` and `CellStudy`.
        """
        assert orders is not None
        runner = Runner(self.model, batch_size)
        self.model = runner.model  # a second call then finds the parameters on the devices
        studies = [
            CellStudy(cells, number, order, masked_cells, masked_genes)
            for number, order in enumerate(orders)
            if order is not None
        ]
        with progress(what, sum(int(study.order.is_target.sum()) for study in studies)) as bar:
            # A section with fewer cells than a bag gives a different shape, which JAX compiles separately.
            for size in sorted({study.order.cells_per_bag for study in studies}, reverse=True):
                same = [study for study in studies if study.order.cells_per_bag == size]
                options = self.options(size, same[0].spatial, with_counts)
                source = BagSource(same, options, exhaustive=True)  # type: ignore[arg-type]
                at_once = runner.size(len(source), size * options.num_positions)
                for result in runner(_records(source, same, options, inputs), at_once, names):
                    yield result
                    bar.update(int(result.is_target.sum()))


def _records(
    source: BagSource, studies: Sequence[CellStudy], options: BagOptions, inputs: PrepareInputs | None
) -> Iterator[Record]:
    """Yield the bags of all studies one after the other, each as a model input (`Record`)."""
    size = options.cells_per_bag
    for number in range(len(source)):
        bag, (study, place) = source.record(number), source.locate(number)
        order = studies[study].order
        part = slice(place * size, (place + 1) * size)
        given = {name: bag[name] for name in ("tokens", *(["coordinates"] if options.spatial else []))}
        given |= inputs(bag, order.rows[part]) if inputs is not None else {}
        yield Record(order.rows[part], order.is_target[part], given, bag)
