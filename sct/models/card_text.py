"""Define the part of a model card that is the same for all models of an architecture."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CardText:
    """Text that describes an architecture in the model cards of its models.

    The configuration class of the architecture stores the text as `CARD`.

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
        Lines of Python that use the loaded `model` on cells `adata`. "" means that the card has no example.
    tags
        Tags for model hubs, in addition to "single-cell".
    """

    title: str
    summary: str
    use: str
    limits: tuple[str, ...]
    example: str = ""
    tags: tuple[str, ...] = ()
