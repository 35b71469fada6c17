"""How far a mean over a few seeds can be trusted: Student's t interval."""

import math
import statistics
from collections.abc import Sequence

T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The 0.975 quantile of Student's t at 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods,
1.3.6.7.2."""


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of independent `values`; None for fewer than two.

    With 31 values or more the quantile of 30 degrees of freedom is used, which is at most 4 % too wide.
    """
    if len(values) < 2:
        return None
    quantile = T[min(len(values) - 1, len(T)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
