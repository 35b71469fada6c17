"""Intervals and tests agree with known cases, cover what they say, and depend on the seed alone."""

import random

import numpy as np
import pytest

from tunekit.core.evaluation.statistics import bootstrap, mean_interval, paired_difference


def test_an_interval_of_a_mean_is_about_that_of_the_normal_distribution():
    scores = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    error = scores.std() / 20
    low, high = mean_interval(scores.tolist(), resamples=4000)
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.1 * error)


def test_an_interval_of_a_share_is_that_of_the_binomial_distribution():
    from scipy.stats import binom

    low, high = mean_interval([1.0] * 30 + [0.0] * 70, resamples=20000)
    exact = binom.ppf([0.025, 0.975], 100, 0.3) / 100
    assert (low, high) == pytest.approx(tuple(exact), abs=0.011)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(2)
    inside = 0
    for seed in range(300):
        low, high = mean_interval(generator.exponential(1.0, size=80).tolist(), seed=seed, resamples=300)
        inside += low <= 1.0 <= high
    assert 0.89 <= inside / 300 <= 0.98


def test_weights_count_a_row_as_often_as_they_say():
    scores, weights = [1.0, 4.0, 2.0, 8.0], [1, 3, 2, 4]
    low, high = mean_interval(scores, weights)
    assert 1 <= low < np.average(scores, weights=weights) < high <= 8
    found = bootstrap(lambda rows: np.average(np.array(scores)[rows], weights=np.array(weights)[rows]), 4)
    assert (low, high) == pytest.approx(found)


def test_equal_scores_have_an_interval_without_width_and_no_difference():
    assert mean_interval([0.5] * 9) == (0.5, 0.5)
    assert paired_difference([0.2, 0.8, 0.4], [0.2, 0.8, 0.4]) == (0, 0, 0, 1)


def test_a_paired_test_sees_what_an_unpaired_one_cannot():
    draw = random.Random(0)
    hardness = [draw.gauss(0, 10) for _ in range(100)]
    better = [value + 1 + draw.gauss(0, 0.5) for value in hardness]
    found = paired_difference(hardness, better)
    assert found.value == pytest.approx(1, abs=0.2)
    assert 0.8 < found.low < found.high < 1.2
    assert found.p == pytest.approx(2 / 1001)
    first, second = mean_interval(hardness), mean_interval(better)
    assert first.high > second.low, "the intervals of the two overlap"
    turned = paired_difference(better, hardness)
    assert (turned.value, turned.p) == (pytest.approx(-found.value), found.p)


def test_p_is_near_that_of_the_t_test_and_even_where_there_is_no_difference():
    from scipy.stats import ttest_rel

    generator = np.random.default_rng(3)
    small = 0
    for seed in range(200):
        first, second = generator.normal(size=(2, 60))
        p = paired_difference(first.tolist(), second.tolist(), seed=seed, resamples=500).p
        assert p == pytest.approx(ttest_rel(first, second).pvalue, abs=0.12)
        small += p <= 0.1
    assert 0.04 <= small / 200 <= 0.17


def test_the_seed_alone_decides():
    scores = [0.1, 0.7, 0.3, 0.9]
    assert mean_interval(scores, seed=1) == mean_interval(scores, seed=1)
    assert mean_interval(scores * 20, seed=1) != mean_interval(scores * 20, seed=2)
    state = np.random.get_state()[1].tolist()
    mean_interval(scores)
    assert np.random.get_state()[1].tolist() == state


def test_scores_of_other_rows_are_no_pairs():
    with pytest.raises(ValueError, match="2 and 1 scores"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no rows"):
        mean_interval([])
