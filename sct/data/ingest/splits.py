"""Which studies are for training, validation and test: by study, never by cell."""

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
    """Raise ConfigError where a study is named for two splits, or is not among `known`."""
    both = sorted(set(validation or ()) & set(test or ()))
    if both:
        raise ConfigError(f"{', '.join(both)} is named for validation and for test: keep one of the two")
    if known is None:
        return
    strange = sorted((set(validation or ()) | set(test or ())) - set(known))
    if strange:
        raise ConfigError(
            f"no study is called {', '.join(strange)}: name validation and test studies among "
            f"{', '.join(sorted(known))}"
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
    """Give each study its split.

    Parameters
    ----------
    names
        All studies of the store.
    previous
        Splits that studies had before; they keep them unless a list or a fraction is given.
    validation, test
        Names of the studies of a split; the whole list, so `()` empties it. None leaves it as it was.
    fraction
        Share of the studies for validation, chosen by a hash of their names. None: 0.1 where there are at
        least ten studies and no validation studies yet, otherwise no choice.
    seed
        Changes the choice.

    Returns
    -------
    Study -> "train", "validation" or "test", and one sentence that says how validation was chosen.

    Raises
    ------
    ConfigError
        Unknown names, a name in two splits, or nothing left to train on.
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
        raise ConfigError("validation studies are given by name and by fraction: keep one of the two")
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
            f"validation: {', '.join(held_out)}, chosen by name; where studies share donors, choose yourself "
            "with --validation=NAME,..."
        )
    elif held_out:
        note = f"validation: {', '.join(held_out)}"
    else:
        note = "no study is held out for validation: name one or more with --validation=NAME,..."
    if "train" not in splits.values():
        raise ConfigError(
            f"no study is left to train on among {', '.join(names)}: hold out fewer, or ingest at least two studies"
        )
    return splits, note


def _order(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
