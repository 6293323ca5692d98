"""Running a model over all cells of an AnnData: what every tool needs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import anndata as ad
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sct.data.bag_order import BagOrder, centred_order, random_order, tile_order
from sct.data.bags import BagOptions, BagSource
from sct.data.cells import Cells, CellStudy, Section
from sct.data.coordinates import SCALES, Scale, doubts, read_scales, write_scales
from sct.errors import ConfigError, DataError
from sct.models import registry
from sct.models.checks import check_outputs
from sct.progress import progress
from sct.version import __version__
from sct.weights.load import load
from sct.weights.pretrained import DATA_OPTIONS, Pretrained

# Gene tokens that one device reads at once, unless one bag alone has more.
TOKENS_PER_DEVICE = 1 << 20
CONTEXTS = ("tiles", "neighbors")

Model = Pretrained | str | os.PathLike[str]


def loaded(model: Model) -> Pretrained:
    """Return a model, loaded where a path or an id is given; `ConfigError` for what is neither, or needs a GPU."""
    if not isinstance(model, Pretrained | str | os.PathLike):
        raise ConfigError(
            f"the model is a {type(model).__name__}, but what sct.load gives, or a path or hub id, is needed (adata "
            "comes first)."
        )
    handle = model if isinstance(model, Pretrained) else load(model)
    registry.check_device(handle.config)
    return handle


def opened(model: Model) -> Pretrained:
    """Return a model, loaded where a path or an id is given, whose outputs these tools can use.

    Raises
    ------
    ConfigError
        The family has no cell embedding.
    """
    handle = loaded(model)
    if handle.family != "sct":
        raise ConfigError(
            f"this function needs a model with cell embeddings (family sct), but the model is of the family "
            f"{handle.family!r}: give another."
        )
    return handle


def check_table(adata: Any, copy: bool) -> None:
    """Raise `DataError` for what is no AnnData, has no cells, or cannot hold results."""
    if not isinstance(adata, ad.AnnData):
        raise DataError(
            f"the data is a {type(adata).__name__}, but an AnnData is needed: read a file with anndata.read_h5ad first."
        )
    if not adata.n_obs:
        raise DataError("the data has no cells: give at least one.")
    if adata.isbacked and adata.is_view:
        raise DataError("a part of a backed AnnData cannot hold results: load it with .to_memory() first.")
    if adata.isbacked and copy:
        raise DataError(
            "a backed AnnData is not copied: leave copy=False, or load it with adata.to_memory()."
        )


def to_write(adata: ad.AnnData, copy: bool) -> ad.AnnData:
    """Return what results are written into: a copy, or `adata` itself, made independent if it is a view."""
    if copy:
        return adata.copy()
    if adata.is_view:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ad.ImplicitModificationWarning)
            adata.obs = adata.obs.copy()
    return adata


def sections(adata: ad.AnnData, batch_key: str | None, spatial_key: str | None) -> list[Section]:
    """Divide cells by a column of obs, in the order of their first cells.

    Positions are rescaled by section, see `sct.data.coordinates.Scale`: by the scale that `uns` has of it, so that
    a part of a section lies as in the whole, or by that of the cells given. Warns where positions look wrong.

    Raises
    ------
    DataError
        There is no such column, a cell has no batch, or positions are missing or not two
        numbers.
    """
    if batch_key is None:
        parts = [("", np.arange(adata.n_obs))]
    else:
        values = column(adata, batch_key, "batch_key")
        if values.isna().any():
            raise DataError(
                f"obs[{batch_key!r}] is missing for {int(values.isna().sum()):,} cells, but every cell needs a batch: "
                "fill it in or leave these cells out."
            )
        parts = [(str(name), np.flatnonzero(values == name)) for name in values.unique()]
    if spatial_key is None:
        return [Section(name, rows) for name, rows in parts]
    if spatial_key not in adata.obsm:
        known = f"only {', '.join(map(repr, adata.obsm))}" if len(adata.obsm) else "it is empty"
        raise DataError(
            f"obsm has no {spatial_key!r}, {known}: name the key of the positions (spatial_key=...)."
        )
    given = np.asarray(adata.obsm[spatial_key])
    known_scales = read_scales(adata.uns, spatial_key, batch_key)
    found = []
    for name, rows in parts:
        where = f"obsm[{spatial_key!r}]{f' of {name}' if name else ''}"
        scale, places = known_scales.get(name), given[rows]
        try:
            if scale is None or not scale.holds(places):
                scale = Scale.of(places)
            section = Section(name, rows, scale.apply(places), scale)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if len(rows) == scale.cells:
            for doubt in doubts(places, adata.obs.iloc[rows], "batch_key={!r}"):
                warnings.warn(f"{where}: {doubt}", UserWarning, stacklevel=3)
        found.append(section)
    return found


def keep_scales(
    target: ad.AnnData, sections: Sequence[Section], batch_key: str | None, spatial_key: str | None
) -> None:
    """Write the scales of sections into `uns`, where parts of `target` keep them."""
    scales = {section.name: section.scale for section in sections if section.scale is not None}
    if spatial_key is not None and scales:
        target.uns[SCALES] = {
            **target.uns.get(SCALES, {}), spatial_key: write_scales(scales, batch_key),
        }  # fmt: skip


def column(adata: ad.AnnData, name: str, what: str) -> Any:
    """Return a column of obs, or say which ones there are."""
    if name not in adata.obs:
        known = f"only {', '.join(map(repr, adata.obs.columns))}" if len(adata.obs.columns) else "it is empty"
        raise DataError(f"obs has no {name!r}, {known}: name another column ({what}=...).")
    return adata.obs[name]


def bag_size(model: Pretrained, cells_per_bag: int | None) -> int:
    """Cells per bag that are asked for, by default those of the model's training."""
    size = cells_per_bag if cells_per_bag is not None else model.data.get("cells_per_bag")
    size = DATA_OPTIONS["cells_per_bag"] if size is None else size
    if size < 1:
        raise ConfigError(f"cells_per_bag is {size}, but at least 1 is needed.")
    return int(size)


def check_seed(seed: int) -> None:
    """Raise `ConfigError` for a number that is no seed."""
    if seed < 0:
        raise ConfigError(f"seed is {seed}, but it must be 0 or more.")


def check_context(context: str, section: Section) -> None:
    """Raise `ConfigError` for a kind of context that there is not, or that needs positions which a section lacks."""
    if context not in CONTEXTS:
        raise ConfigError(f"context is {context!r}, but it must be one of {', '.join(CONTEXTS)}.")
    if context != CONTEXTS[0] and section.places is None:
        raise ConfigError(f"context={context!r} needs positions: give spatial_key as well.")


def order_of(section: Section, cells_per_bag: int, seed: int, context: str = "tiles") -> BagOrder:
    """Bags of a section: random ones, or where cells have positions tiles or neighbourhoods.

    Raises
    ------
    ConfigError
        Another kind of context than these.
    """
    check_context(context, section)
    if section.places is None:
        return random_order(section.rows, cells_per_bag, seed)
    make = tile_order if context == "tiles" else centred_order
    return make(section.rows, section.places, cells_per_bag)


@dataclasses.dataclass(frozen=True)
class Result:
    """A bag and what the model says of it.

    Attributes
    ----------
    rows, counted
        (K,) rows of the table, and whether a result is to be taken from here.
    bag
        What was read, see `BagSource`.
    outputs
        Results of the model, by name.
    """

    rows: np.ndarray
    counted: np.ndarray
    bag: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class Runner:
    """Applies a model to bags, several at once, on all devices of this process.

    Parameters
    ----------
    model
        The model; its variables are copied to every device.
    batch_size
        Bags at once; by default as many as hold about a million tokens on each device.
    """

    def __init__(self, model: Pretrained, batch_size: int | None = None):
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but at least 1 is needed.")
        self._devices = jax.local_devices()
        self._mesh = Mesh(np.asarray(self._devices), ("data",))
        self.batch_size = batch_size
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self.model = dataclasses.replace(model, variables=jax.device_put(model.variables, everywhere))

    def _bags(self, number: int, cells_per_bag: int) -> int:
        devices = len(self._devices)
        size = self.batch_size
        if size is None:
            size = devices * max(1, TOKENS_PER_DEVICE // (cells_per_bag * self.model.config.num_genes))
        size = min(size, number)
        return -(-size // devices) * devices

    def __call__(
        self,
        cells: Cells,
        orders: Sequence[BagOrder | None],
        outputs: Sequence[str],
        what: str,
        inputs: Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]] | None = None,
        with_counts: bool = False,
        hidden_cells: np.ndarray | None = None,
        hidden_genes: np.ndarray | None = None,
    ) -> Iterator[Result]:
        """Run over all bags, with a progress bar.

        Parameters
        ----------
        cells
            The table.
        orders
            Bags of each of its sections; None for a section that is left out.
        outputs
            Names of the model's results.
        what
            Said beside the progress bar.
        inputs
            (bag, rows) -> further or changed inputs of the model, without the axis of bags.
        with_counts, hidden_cells, hidden_genes
            See `BagOptions` and `CellStudy`.
        """
        studies = [
            CellStudy(cells, number, order, hidden_cells, hidden_genes)
            for number, order in enumerate(orders)
            if order is not None
        ]
        with progress(what, sum(int(study.order.counted.sum()) for study in studies)) as bar:
            # Sections with fewer cells than a bag have bags of another shape, and a program of their own.
            for size in sorted({study.order.cells_per_bag for study in studies}, reverse=True):
                same = [study for study in studies if study.order.cells_per_bag == size]
                for result in self._run(same, size, outputs, inputs, with_counts):
                    yield result
                    bar.update(int(result.counted.sum()))

    def _run(
        self,
        studies: list[CellStudy],
        cells_per_bag: int,
        outputs: Sequence[str],
        inputs: Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]] | None,
        with_counts: bool,
    ) -> Iterator[Result]:
        config = self.model.config
        use_places = config.use_spatial and studies[0].spatial
        options = BagOptions(
            cells_per_bag=cells_per_bag,
            num_positions=config.num_genes,
            num_bins=config.num_bins,
            noise_fraction=self.model.data.get("noise_fraction", DATA_OPTIONS["noise_fraction"]),
            spatial=use_places,
            with_counts=with_counts,
        )
        source = BagSource(studies, options, exhaustive=True)  # type: ignore[arg-type]
        size = self._bags(len(source), cells_per_bag)
        split = NamedSharding(self._mesh, PartitionSpec("data"))

        def start(first: int) -> tuple[list[Result], Any]:
            asked, given = [], []
            for number in range(first, min(first + size, len(source))):
                bag, (study, place) = source.bag(number), source.locate(number)
                order = studies[study].order
                part = slice(place * cells_per_bag, (place + 1) * cells_per_bag)
                asked.append(Result(order.rows[part], order.counted[part], bag, {}))
                one = {"tokens": bag["tokens"]}
                if use_places:
                    one["coordinates"] = bag["coordinates"]
                given.append(one | (inputs(bag, order.rows[part]) if inputs is not None else {}))
            given += given[-1:] * (size - len(given))  # one shape, compiled once
            stacked = {name: np.stack([one[name] for one in given]) for name in given[0]}
            return asked, self.model.apply(outputs=outputs, **jax.device_put(stacked, split))

        # While the devices work on one batch the next is read.
        pending = None
        for first in [*range(0, len(source), size), None]:
            begun = start(first) if first is not None else None
            if pending is not None:
                asked, results = pending
                arrays = {name: np.asarray(results[name]) for name in outputs}
                for name, array in arrays.items():
                    check_outputs(array[: len(asked)], name, "bags")
                for place, one in enumerate(asked):
                    yield dataclasses.replace(one, outputs={n: a[place] for n, a in arrays.items()})
            pending = begun


def check_not_empty(cells: Cells, needed: np.ndarray | None = None) -> None:
    """Raise `DataError` where cells (of those needed) have no count of the model's genes."""
    empty = cells.cell_totals == 0
    if needed is not None:
        empty &= needed
    if empty.any():
        raise DataError(
            f"{int(empty.sum()):,} of {cells.n_cells:,} cells have no count of the model's genes (the first is row "
            f"{int(np.argmax(empty))}): leave them out, for example by adata = "
            "adata[adata[:, model.genes.align(adata.var).columns >= 0].X.sum(axis=1) > 0].copy()."
        )


def record(model: Pretrained, table: Cells, /, **settings: Any) -> Mapping[str, Any]:
    """What a tool writes into uns, so that a result can be made again; h5ad knows no None."""
    return {
        "sct_version": __version__,
        "model": repr(model),
        "weights": model.fingerprint,
        "model_step": -1 if model.step is None else model.step,
        "vocabulary_hash": model.vocabulary.hash,
        "counts_from": table.counts_from,
        "genes_matched": table.alignment.matched,
        **{name: "" if value is None else value for name, value in settings.items()},
    }
