"""Correct the bias that masking in training adds to a model's probabilities of expression.

Training masks expressed genes more often than unexpressed ones (15% and 1% in the sCT paper). A model that is trained
without logit adjustment therefore predicts "expressed" far too often. Adding log(masking rate of expressed genes / rate
of unexpressed genes) to the logit of "unexpressed" removes this bias (Saerens et al., Neural Computation 2002). The
correction is exact if one gene is masked. If many genes are masked, the model also assumes that the other masked genes
are likely expressed, and part of the bias remains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sct import messages
from sct.data.masking import Masking
from sct.errors import CheckpointError, ConfigError

PAPER = Masking()  # 15% of expressed and 1% of unexpressed genes
ASSUMED = (
    "this model has no record of the masking rates in training: the probabilities of expression are computed with the "
    "rates of the sCT paper (15% of expressed and 1% of unexpressed genes)."
)

ONE_SIDED = (
    "the training of this model masked only expressed or only unexpressed genes, so it cannot predict whether a gene "
    "is expressed: ignore its probabilities and expected counts, and use its levels only for genes that are known to "
    "be expressed."
)


@dataclasses.dataclass(frozen=True)
class ClassPrior:
    """Describe how much more often training masks expressed genes than unexpressed genes, to correct predictions.

    Attributes
    ----------
    log_ratio
        log(masking rate of expressed genes / masking rate of unexpressed genes).
    adjusted
        Whether the training loss already removed the bias (logit adjustment).
    assumed
        Whether the masking rates of the sCT paper are assumed, because the model folder does not record its own rates.
    one_sided
        Whether training masked only expressed or only unexpressed genes. In this case, the bias cannot be corrected.
    """

    log_ratio: float
    adjusted: bool = False
    assumed: bool = False
    one_sided: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ClassPrior:
        """Read the masking rates from a model's data options; raise `CheckpointError` if they are invalid."""
        recorded, adjusted = data.get("masking"), data.get("logit_adjustment") is True
        if not isinstance(recorded, Mapping):
            return cls(PAPER.log_ratio, adjusted, assumed=not adjusted)
        try:
            masking = Masking.from_record(recorded)
        except ConfigError as error:
            raise CheckpointError(
                f"the masking rates that this model was trained with cannot be read: {error}"
            ) from error
        try:
            return cls(masking.log_ratio, adjusted)
        except ConfigError:  # a masking rate of zero has no logarithm
            return cls(0.0, adjusted, one_sided=True)

    @property
    def offset(self) -> float:
        """Return the value to add to the logit of "unexpressed" to remove the bias."""
        return 0.0 if self.adjusted else self.log_ratio

    @property
    def odds(self) -> float:
        """Return the factor that converts unbiased odds of expression to the odds in the evaluation of the sCT paper.

        The paper's evaluation does not remove the bias of training. For a model without logit adjustment, the factor
        restores the probabilities of the raw logits. For a model with logit adjustment, the factor gives the
        probabilities that a model trained with the paper's loss would predict.
        """
        return math.exp(PAPER.log_ratio if self.adjusted else self.log_ratio)

    def warn(self) -> None:
        """Issue a warning if the masking rates are assumed, or if the bias cannot be corrected."""
        if self.assumed or self.one_sided:
            messages.warn(ASSUMED if self.assumed else ONE_SIDED)
