"""What a plot of quality against cost joins by a line is the Pareto front."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit.core.common.plots import Point, pareto

NUMBERS = st.integers(min_value=0, max_value=4).map(float)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8), st.sampled_from(list(product(["min", "max"], repeat=2))))
def test_the_front_is_what_nothing_beats_and_it_beats_the_rest(places, better):
    points = [Point(str(at), *place) for at, place in enumerate(places)]

    def better_than(one, other):
        gains = [
            (b - a) * (1 if way == "min" else -1) for a, b, way in zip(*map(place, (one, other)), better, strict=True)
        ]
        return min(gains) >= 0 < max(gains)

    front = pareto(points, better)
    assert [point.cost for point in front] == sorted(point.cost for point in front)
    for point in points:
        assert (point in front) == (not any(better_than(other, point) for other in points))


def place(point):
    return point.cost, point.quality


def test_the_axes_of_costs_far_apart_are_logarithmic():
    pytest.importorskip("matplotlib", reason='pip install "tunekit-sdk[plots]"')
    from tunekit.core.common.plots import against

    near = against([Point("a", 1, 1), Point("b", 2, 2)], ("seconds", "nll"), ("min", "min"))
    far = against([Point("a", 1, 1), Point("b", 2000, 2)], ("seconds", "nll"), ("min", "min"))
    assert [figure.axes[0].get_xscale() for figure in (near, far)] == ["linear", "log"]
