"""Assign studies to the training, validation and test splits. All cells of a study are in the same split."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from sct.checks import check_share
from sct.errors import ConfigError

AUTOMATIC_FROM = 10
AUTOMATIC_FRACTION = 0.1


def check_splits(
    validation: Collection[str] | None, test: Collection[str] | None, known: Collection[str] | None = None
) -> None:
    """Raise `ConfigError` if a study is listed in two splits or is not in `known`."""
    both = sorted(set(validation or ()) & set(test or ()))
    if both:
        raise ConfigError(
            f"validation and test both list {', '.join(both)}, but a study can be in only one split: remove each of "
            "these studies from one of the two lists."
        )
    if known is None:
        return
    unknown = sorted((set(validation or ()) | set(test or ())) - set(known))
    if unknown:
        raise ConfigError(
            f"the option `validation` or `test` has {', '.join(unknown)}, but the store has no study "
            f"of this name: choose from {', '.join(sorted(known))}."
        )


def assign_splits(
    names: Sequence[str],
    previous: Mapping[str, str],
    *,
    validation: Collection[str] | None = None,
    test: Collection[str] | None = None,
    fraction: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, str], str]:
    """Assign each study to a split.

    Parameters
    ----------
    names
        All studies of the store.
    previous
        Current split of each study. A study keeps its split unless a list or a fraction is given.
    validation, test
        Complete list of the studies in the validation split or the test split; `()` empties the split. None keeps the
        current split.
    fraction
        Fraction of the studies for validation, chosen by a hash of their names. Default: 0.1 if there are at least ten
        studies and no validation study yet, otherwise no automatic choice.
    seed
        Random seed of the choice of validation studies.

    Returns
    -------
    Two values: a dict from each study to "train", "validation" or "test"; and a sentence that says how the validation
    studies were chosen.

    Raises
    ------
    ConfigError
        A name is unknown or in two splits, validation is given both by name and by fraction, or no study is left for
        training.
    """
    check_splits(validation, test, names)
    splits = {name: previous.get(name, "train") for name in names}
    for split, given in (("validation", validation), ("test", test)):
        if given is not None:
            for name in names:
                if name in given:
                    splits[name] = split
                elif splits[name] == split:
                    splits[name] = "train"
    held_out = [name for name in names if splits[name] == "validation"]
    if fraction is not None and validation is not None:
        raise ConfigError("validation and validation_fraction are both set: set only one of them.")
    automatic = fraction is None and validation is None and not held_out and len(names) >= AUTOMATIC_FROM
    if fraction is not None or automatic:
        share = AUTOMATIC_FRACTION if fraction is None else fraction
        check_share("the validation fraction", share, one=False)
        wanted = min(round(share * len(names)), len(names) - 1)
        if share > 0:
            wanted = max(wanted, 1)
        free = sorted(
            (name for name in names if splits[name] == "train"), key=lambda name: _order(name, seed)
        )
        for name in free[: max(0, wanted - len(held_out))]:
            splits[name] = "validation"
        held_out = [name for name in names if splits[name] == "validation"]
        note = (
            f"validation: {', '.join(held_out)} (chosen by a hash of the name; if studies share donors, choose "
            "yourself with --validation=NAME,...)"
        )
    elif held_out:
        note = f"validation: {', '.join(held_out)}"
    else:
        note = "no study is held out for validation: set --validation=NAME,... to hold out studies"
    if "train" not in splits.values():
        raise ConfigError(
            f"all studies ({', '.join(names)}) are held out for validation or test, so no study is left for training: "
            "hold out fewer studies, or ingest more."
        )
    return splits, note


def _order(name: str, seed: int) -> bytes:
    """Return a key by which studies are sorted. The studies with the lowest keys are chosen for validation."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
