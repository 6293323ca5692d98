"""The part of a model card that is the same for all models of an architecture."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CardText:
    """Describe an architecture for the readers of its model cards. A configuration class holds it as `CARD`.

    Attributes
    ----------
    title
        Heading of the card.
    summary
        What the model is and which paper describes it, as sentences.
    use
        What the model is meant for, as sentences.
    limits
        What the model cannot do or what its results depend on, one sentence each.
    example
        Lines of Python that use the loaded `model` on cells `adata`; "" for none.
    tags
        Tags for model hubs, in addition to "single-cell".
    """

    title: str
    summary: str
    use: str
    limits: tuple[str, ...]
    example: str = ""
    tags: tuple[str, ...] = ()
