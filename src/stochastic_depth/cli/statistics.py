"""Means and intervals over seeds."""

from collections.abc import Sequence
from statistics import fmean, stdev

# The two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean; None where one value tells nothing of it."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    quantile = T[freedom - 1] if freedom <= len(T) else 1.96 + 2.45 / freedom
    return float(quantile * stdev(values) / len(values) ** 0.5)


def middle_mean(values: Sequence[float]) -> float:
    """The mean of the middle half, which a few steps that had to wait for a core don't move."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return fmean(ordered[cut : len(ordered) - cut])
