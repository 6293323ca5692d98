"""Run models that read cells in bags (sCT): an input is a bag of cells with the expression levels of all genes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from sct.checks import check_at_least, check_choice
from sct.data.bag_order import BagOrder, centered_order, random_order, tile_order
from sct.data.bags import BagOptions, BagSource
from sct.data.cells import CellCounts, CellStudy, Section
from sct.data.class_prior import ClassPrior
from sct.data.loader import RecordSource
from sct.errors import ConfigError
from sct.inference.readouts import FITTED, Readout
from sct.inference.records import IS_TARGET, ROWS
from sct.inference.runner import Record, RecordOutputs, Runner
from sct.models import registry
from sct.models.sct import level_probabilities
from sct.progress import progress
from sct.weights.pretrained import DATA_OPTIONS, Pretrained

CONTEXTS = ("tiles", "neighbors")
# Names of flat readouts, with the intermediate activations that hold them.
_FLAT = MappingProxyType({"flat": "transformer_out", "conv": "conv_out"})
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
        (B, K, D) and, at the requested `positions`, `logits`. Its intermediates may be `transformer_out` and
        `conv_out` (B, K * L, D). If its configuration has a `code_dim` above 0, it also has the output `code`
        (B, K, code_dim).
    """

    in_bags = True
    readout = "cell_embedding"

    def __init__(self, model: Pretrained):
        self.model = model

    @property
    def readouts(self) -> Mapping[str, Readout]:
        """Return the kinds of cell embeddings that this model offers, by name; see `sct.tl.embed`."""
        inner = registry.family(self.model.family).module.intermediates
        found = {"mean": Readout(self.readout)}
        found |= {name: Readout(output, flat=True) for name, output in _FLAT.items() if output in inner}
        if getattr(self.model.config, "code_dim", 0) > 0:
            found["code"] = Readout("code")
        fitted = self.model.readout
        if fitted is not None and fitted.source in found:
            found[FITTED] = dataclasses.replace(found[fitted.source], linear=fitted)
        return found if len(found) > 1 else {}

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

    def tokens_per_record(self, cells_per_bag: int | None = None) -> int:
        """Return the number of gene positions in a bag."""
        return self.cells_per_bag(cells_per_bag) * int(self.model.config.num_genes)

    def source(
        self,
        cells: CellCounts,
        rows: np.ndarray,
        *,
        shuffle: bool,
        seed: int = 0,
        cells_per_bag: int | None = None,
    ) -> RecordSource:
        """Return cells as training records, in bags; see `sct.inference.readers.CellReader.source`."""
        order = random_order(rows, self.cells_per_bag(cells_per_bag), seed)
        options = self.options(order.cells_per_bag, spatial=False)
        options = dataclasses.replace(options, shuffle_cells=len(rows), seed=seed)
        return BagRecords(cells, order, options, shuffle)

    def results(
        self,
        cells: CellCounts,
        orders: Sequence[BagOrder | None] | None,
        names: Sequence[str] | Mapping[str, Readout],
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


def _inputs(bag: Mapping[str, np.ndarray], options: BagOptions) -> dict[str, np.ndarray]:
    """Select the inputs of the model from a bag."""
    return {name: bag[name] for name in ("tokens", *(["coordinates"] if options.spatial else []))}


class BagRecords:
    """Provide bags of cells as training records; see `sct.inference.readers.CellReader.source`.

    Parameters
    ----------
    cells
        Table of cells.
    order
        Cells bag by bag.
    options
        See `BagOptions`.
    shuffle
        Whether bags have other cells in every epoch.
    """

    def __init__(self, cells: CellCounts, order: BagOrder, options: BagOptions, shuffle: bool):
        self.order, self.options, self.shuffle = order, options, shuffle
        # The section decides which genes are noise, so cells of other sections have no influence.
        own = [number for number, part in enumerate(cells.sections) if order.rows[0] in part.rows]
        study = CellStudy(cells, own[0], order, name="cells")
        self.bags = BagSource([study], options, exhaustive=not shuffle)  # type: ignore[list-item]

    def __len__(self) -> int:
        return len(self.bags)

    def describe(self, number: int, epoch: int = 0) -> str:
        """Return the text that identifies a bag in messages."""
        return self.bags.describe(number, epoch)

    def record(self, number: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """Return one bag: the inputs of the model, and its cells."""
        _, places = self.bags.rows(number, epoch)
        is_target = np.ones(len(places), bool) if self.shuffle else self.order.is_target[places]
        found = {ROWS: self.order.rows[places].astype(np.int32), IS_TARGET: is_target}
        return {**_inputs(self.bags.record(number, epoch), self.options), **found}


def _records(
    source: BagSource, studies: Sequence[CellStudy], options: BagOptions, inputs: PrepareInputs | None
) -> Iterator[Record]:
    """Yield the bags of all studies one after the other, each as a model input (`Record`)."""
    size = options.cells_per_bag
    for number in range(len(source)):
        bag, (study, place) = source.record(number), source.locate(number)
        order = studies[study].order
        part = slice(place * size, (place + 1) * size)
        given = _inputs(bag, options)
        given |= inputs(bag, order.rows[part]) if inputs is not None else {}
        yield Record(order.rows[part], order.is_target[part], given, bag)
