"""What masking in training did to a model's probabilities of expression, and how inference takes it back.

Training masks expressed genes more often than unexpressed ones (15% and 1% in the sCT paper), so a model that is
trained without logit adjustment says "expressed" far too often. Adding log(rate of expressed / rate of unexpressed)
to its logit of "unexpressed" gives the probabilities of an ordinary gene (Saerens et al., Neural Computation 2002).
That is exact where one gene is hidden; where many are, the model also reads the other hidden ones as likely
expressed, and a part of the bias stays.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from sct.data.masking import Masking
from sct.errors import CheckpointError, ConfigError

PAPER = Masking()  # 15% of expressed and 1% of unexpressed genes
ASSUMED = (
    "this model does not say how its training masked genes: 15% of expressed and 1% of unexpressed genes are assumed, "
    "as in the sCT paper, to turn its logits into probabilities of expression."
)

ONE_SIDED = (
    "this model's training masked only expressed or only unexpressed genes, so it cannot tell whether a gene is "
    "expressed: ignore its probabilities and expected counts, and use its levels only for genes that you know to be "
    "expressed."
)


@dataclasses.dataclass(frozen=True)
class ClassPrior:
    """The class balance among masked genes in training, relative to that of all genes.

    Attributes
    ----------
    log_ratio
        log(masking rate of expressed genes / of unexpressed ones).
    adjusted
        Whether the training loss removed it (logit adjustment), so that the logits are those of an ordinary gene.
    assumed
        Whether there is no record of the rates, and the paper's are assumed.
    one_sided
        Whether only expressed, or only unexpressed, genes were masked: nothing can correct that.
    """

    log_ratio: float
    adjusted: bool = False
    assumed: bool = False
    one_sided: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ClassPrior:
        """Read it from the `data` section of a model; `CheckpointError` for a record that is none."""
        recorded, adjusted = data.get("masking"), data.get("logit_adjustment") is True
        if not isinstance(recorded, Mapping):
            return cls(PAPER.log_ratio, adjusted, assumed=not adjusted)
        try:
            masking = Masking.from_record(recorded)
        except ConfigError as error:
            raise CheckpointError(
                f"how this model's training masked genes cannot be read: {error}"
            ) from error
        try:
            return cls(masking.log_ratio, adjusted)
        except ConfigError:  # trained with a rate of zero, which has no logarithm
            return cls(0.0, adjusted, one_sided=True)

    @property
    def offset(self) -> float:
        """What to add to the logit of "unexpressed" for probabilities of an ordinary gene."""
        return 0.0 if self.adjusted else self.log_ratio

    @property
    def odds(self) -> float:
        """By what factor the paper's protocol multiplies the odds of expression of an ordinary gene.

        A model without adjustment then answers with its own logits, and one with it as if it had been trained by the
        paper's loss.
        """
        return math.exp(PAPER.log_ratio if self.adjusted else self.log_ratio)

    def warn(self) -> None:
        """Warn a user where the rates are assumed, or leave nothing to correct."""
        if self.assumed or self.one_sided:
            warnings.warn(ASSUMED if self.assumed else ONE_SIDED, UserWarning, stacklevel=3)
