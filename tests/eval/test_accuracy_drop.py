"""Drops of top-1 and their intervals."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.accuracy_drop import paired_drop


def _right(seed, count=500, accuracy=0.9):
    return np.random.default_rng(seed).random(count) < accuracy


def test_the_interval_is_a_paired_bootstrap_s():
    reference, other = _right(0), _right(0) & _right(1, accuracy=0.97)
    drop = paired_drop(reference, other, resamples=40_000)
    expected = scipy.stats.bootstrap(
        (reference.astype(float), other.astype(float)),
        lambda a, b: (a.mean() - b.mean()) * 100,
        paired=True,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    assert drop.points == pytest.approx((reference.mean() - other.mean()) * 100)
    assert (drop.low, drop.high) == pytest.approx((expected.low, expected.high), abs=0.2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_drops_mirror_each_other_and_lie_in_their_interval(pairs):
    one, other = np.array(pairs).T
    drop, mirror = paired_drop(one, other), paired_drop(other, one)
    assert drop.points == -mirror.points
    assert drop.low - 1e-9 <= drop.points <= drop.high + 1e-9
    bound = scipy.stats.binomtest(0, len(one)).proportion_ci(method="exact").high * 100
    alike = paired_drop(one, one)
    assert alike.points == 0.0 and (-alike.low, alike.high) == pytest.approx((bound, bound))


def test_arrays_that_are_not_pairs_are_refused():
    with pytest.raises(ValueError):
        paired_drop(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError):
        paired_drop(np.ones(0, bool), np.ones(0, bool))
