"""Percentiles of latency with a confidence bound, by the early-stopping rule of MLPerf Inference.

A percentile of few calls is mostly chance. MLPerf therefore states, with 99% confidence, a latency that the percentile
does not exceed, and none at all if there are too few calls:
https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc (appendix on early stopping).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats

CONFIDENCE = 0.99


def percentile_bound(values: Sequence[float] | np.ndarray, percentile: float) -> float | None:
    """Returns the smallest value that a percentile exceeds with a probability of at most 1%; None for too few values.

    The number of values above the true percentile is binomial. If at most ``t`` of them were above it with a
    probability of 1% or less, then it lies below the ``t``-th largest value.

    Args:
        values: independent measurements.
        percentile: as a share, such as 0.99.
    """
    count = len(values)
    above = int(scipy.stats.binom.ppf(1 - CONFIDENCE, count, 1 - percentile)) if count else 0
    while above > 0 and scipy.stats.binom.cdf(above, count, 1 - percentile) > 1 - CONFIDENCE:
        above -= 1
    return float(np.sort(values)[count - above]) if above > 0 else None
