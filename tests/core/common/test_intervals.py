"""The interval of a mean is Student's: the quantiles are those of its density, integrated here."""

import math
import statistics

import pytest

from tunekit.core.common.intervals import T, half_width


def covered(t, freedom, pieces=2000):
    """The probability between -t and t, by Simpson's rule."""
    constant = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    width = 2 * t / pieces
    density = [constant * (1 + (-t + width * at) ** 2 / freedom) ** (-(freedom + 1) / 2) for at in range(pieces + 1)]
    return width / 3 * (density[0] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]) + density[-1])


@pytest.mark.parametrize("freedom", range(1, 31))
def test_the_quantiles_cover_95_percent(freedom):
    assert covered(T[freedom - 1], freedom) == pytest.approx(0.95, abs=5e-5)


def test_the_half_width_is_the_quantile_times_the_standard_error():
    # Cushny and Peebles' hours of sleep, as Student (1908) took them: mean 1.58, standard error 0.38896.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert half_width(gained) == pytest.approx(0.8798, abs=1e-3)
    assert half_width([3.0]) is None
    assert half_width([]) is None
    assert half_width([3.0, 3.0]) == 0
    many = [float(n) for n in range(100)]
    assert half_width(many) == pytest.approx(2.042 * statistics.stdev(many) / 10)
