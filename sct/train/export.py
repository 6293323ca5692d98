"""Complete a trained model before it is exported: fit its readout, and record its training cells."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sct import families
from sct.checks import check_at_least
from sct.errors import SctError, first_line

if TYPE_CHECKING:
    from sct.data.store import Store
    from sct.weights.pretrained import Pretrained

_LONGEST = 1000  # characters of an error in a note


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of the model folder that a run writes at its end. They do not affect the training.

    Parameters
    ----------
    readout_dim
        Number of dimensions of the readout "fitted" (`sct.tl.fit_readout`), for models that have flat readouts; 0 to
        fit none.
    readout_source
        Flat readout that it maps: "flat" or "conv".
    readout_standardize
        Whether each feature of the flat readout is divided by its standard deviation first.
    readout_cells
        Approximate largest number of training cells on which it is fitted: studies give whole bags of cells.
    training_cells
        Hashes of the training cells are stored (`sct.tl.in_training_set`) if there are at most this many training
        cells; a cell takes 32 bytes. 0 to store none.
    """

    readout_dim: int = 64
    readout_source: str = "flat"
    readout_standardize: bool = False
    readout_cells: int = 20_000
    training_cells: int = 1_000_000

    def __post_init__(self) -> None:
        for name, least in (("readout_dim", 0), ("readout_cells", 1), ("training_cells", 0)):
            check_at_least(f"export.{name}", getattr(self, name), least)


def completed(
    model: Pretrained, store: Store, options: ExportConfig, init_from: str = ""
) -> tuple[Pretrained, list[str]]:
    """Return a trained model with its fitted readout and the hashes of its training cells.

    Parameters
    ----------
    model
        The trained model.
    store
        Store of the run. Its training studies have the training cells.
    options
        See `ExportConfig`.
    init_from
        Model that training started from; "" for none.

    Returns
    -------
    The model, and a line for each part that could not be made, with the reason.
    """
    from sct.inference.fitting import FitOptions, fit_to_store
    from sct.weights.training_cells import TrainingCells

    notes: list[str] = []
    training = store.split("train")
    studies = [study for study in training if study.values == "counts"]
    without = [study.name for study in training if study.values != "counts"]
    cells = sum(study.n_cells for study in studies)
    genes = model.genes
    if genes is None or not studies:
        return model, notes
    make = families.model(model.family).embed
    reader = None if make is None else make(model)
    if options.readout_dim and reader is not None and any(each.flat for each in reader.readouts.values()):
        chosen = FitOptions(
            options.readout_dim, options.readout_source, options.readout_standardize, options.readout_cells
        )
        try:
            model = dataclasses.replace(model, readout=fit_to_store(reader, store, chosen))
        except Exception as error:  # the model is trained and saved, so that no error here may end the run
            notes.append(f"no readout was fitted: {_reason(error)}")
    if 0 < cells <= options.training_cells:
        try:
            known = TrainingCells.of(studies, genes, init_from=init_from, without_counts=without)
            model = dataclasses.replace(model, training_cells=known)
        except Exception as error:
            notes.append(f"no hashes of the training cells were stored: {_reason(error)}")
    return model, notes


def _reason(error: Exception) -> str:
    """Return the first line of an error, with its type unless it is an error that the user can fix."""
    line = first_line(error, _LONGEST)
    return line if isinstance(error, SctError) else f"{type(error).__name__}: {line}"
