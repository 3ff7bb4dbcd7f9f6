"""Accuracy, McNemar's test, changes and drops, against torchmetrics, scipy, exact sums and known answers."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy

from eval.metrics.paired import compare_predictions, mcnemar, paired_drop, top_k_accuracy
from eval.metrics.predictions import Predictions


def _logits(images, classes, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(images, classes)).astype(np.float32), generator.integers(0, classes, images)


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_is_torchmetrics(k):
    logits, labels = _logits(400, 12)
    expected = multiclass_accuracy(torch.from_numpy(logits), torch.from_numpy(labels), 12, average="micro", top_k=k)
    share = top_k_accuracy(Predictions.of(logits, labels), k)
    assert share.percent == pytest.approx(float(expected) * 100, abs=1e-4)
    assert share.low < share.percent < share.high


def test_of_equal_logits_the_first_class_counts_as_it_does_for_argmax():
    logits, labels = np.zeros((3, 4), np.float32), np.array([0, 1, 3])
    shares = [top_k_accuracy(Predictions.of(logits, labels), k).percent for k in (1, 2, 4)]
    assert shares == pytest.approx([100 / 3, 200 / 3, 100])


def test_the_interval_is_wilson_s():
    """The score test's own inverse: at either end the share seen lies 1.96 standard errors away."""
    logits = np.zeros((50, 2), np.float32)
    share = top_k_accuracy(Predictions.of(logits, (np.arange(50) % 5 == 0).astype(int)))
    for end in (share.low / 100, share.high / 100):
        assert abs(0.8 - end) / np.sqrt(end * (1 - end) / 50) == pytest.approx(1.959964, rel=1e-5)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial_sum(lost, gained, same):
    total = lost + gained
    reference = np.array([True] * lost + [False] * gained + [True] * same, bool)
    tail = sum(Fraction(comb(total, k), 2**total) for k in range(min(lost, gained) + 1))
    result = mcnemar(reference, np.array([False] * lost + [True] * gained + [True] * same, bool))
    assert (result.lost, result.gained) == (lost, gained)
    assert result.p == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_what_changes_is_what_was_changed():
    reference = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]] * 5
    labels = np.array([0, 1, 2, 0, 1])
    other = reference.copy()
    other[0] = [0, 5, 0, 0]  # right to wrong
    other[3] = [5, 0, 0, 0]  # wrong to right
    other[4] = [0, 0, 5, 0]  # wrong to wrong
    change = compare_predictions(Predictions.of(reference, labels), Predictions.of(other, labels))
    assert [list(flips) for flips in (change.flips.lost, change.flips.gained, change.flips.moved)] == [[0], [3], [4]]
    assert change.agreement == 40 and (change.test.lost, change.test.gained, change.test.p) == (1, 1, 1)
    assert change.confidence_shift == pytest.approx(0)
    assert [(c.label, c.images, c.reference, c.other) for c in change.classes] == [
        (0, 2, 50, 50),
        (1, 2, 50, 50),
        (2, 1, 100, 100),
    ]
    top, rest = np.exp(2.5), 3
    softer = compare_predictions(Predictions.of(reference, labels), Predictions.of(reference / 2, labels))
    assert softer.confidence_shift == pytest.approx(top / (top + rest) - top**2 / (top**2 + rest), abs=1e-6)
    assert softer.agreement == 100


def test_only_the_class_that_really_changed_is_significant():
    """One class of fifty loses all of its 20 images; another loses 6, which is significant alone (p 0.03) only."""
    labels = np.repeat(np.arange(50), 20)
    reference = np.eye(50, dtype=np.float32)[labels]
    other = reference.copy()
    other[:20] = np.eye(50)[1]
    other[40:46] = np.eye(50)[1]
    classes = compare_predictions(Predictions.of(reference, labels), Predictions.of(other, labels)).classes
    assert [c.label for c in classes if c.significant] == [0]
    assert [c.label for c in classes if c.p < 0.05] == [0, 2]


def test_predictions_that_do_not_fit_are_refused():
    logits, labels = _logits(6, 3)
    broken = logits.copy()
    broken[2, 1] = np.nan
    for bad, words in (
        ((logits[:5], labels), r"\(5, 3\).*\(6,\)"),
        ((logits[:0], labels[:0]), r"\(0, 3\)"),
        ((broken, labels), "1 of 6"),
        ((logits, labels + 3), "3 classes"),
    ):
        with pytest.raises(ValueError, match=words):
            Predictions.of(*bad)
    whole = Predictions.of(logits, labels)
    for other in (Predictions.of(logits[:5], labels[:5]), Predictions.of(logits, (labels + 1) % 3)):
        with pytest.raises(ValueError, match="6"):
            compare_predictions(whole, other)
    for temperature in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match="temperature"):
            Predictions.of(logits, labels, temperature)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))


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
    assert -100 <= drop.low <= drop.points + 1e-9 and drop.points - 1e-9 <= drop.high <= 100
    bound = scipy.stats.binomtest(0, len(one)).proportion_ci(method="exact").high * 100
    alike = paired_drop(one, one)
    assert alike.points == 0.0 and (-alike.low, alike.high) == pytest.approx((bound, bound))


def test_arrays_that_are_not_pairs_are_refused():
    with pytest.raises(ValueError):
        paired_drop(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError):
        paired_drop(np.ones(0, bool), np.ones(0, bool))
