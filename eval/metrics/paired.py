"""Accuracy of a model, and its changes from a reference on the same images, with intervals and tests.

Top-1 alone hides changes: two models can be equally accurate, but right on different images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from eval.metrics.predictions import Predictions
from illama.manifest import Drop


@dataclass(frozen=True)
class Share:
    """A share of ``images`` in percent, with its 95% Wilson interval; 0 images in a report of an earlier version."""

    percent: float
    low: float
    high: float
    images: int = 0

    def __str__(self) -> str:
        return f"{self.percent:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of whether two models are equally accurate.

    Attributes:
        lost: number of images that only the reference gets right.
        gained: number of images that only the other model gets right.
        p: two-sided p-value, by the exact binomial distribution: the probability of a split at least as unequal if
            each of these images were lost or gained with equal probability.
    """

    lost: int
    gained: int
    p: float


@dataclass(frozen=True)
class ClassChange:
    """Change of the accuracy in one class.

    Attributes:
        images: number of images of the class.
        reference: accuracy of the reference on them, in percent.
        other: accuracy of the other model on them, in percent.
        p: p-value of McNemar's test on them.
        significant: whether the change is significant among all classes, at a false discovery rate of 5% (Benjamini
            and Hochberg, 1995).
    """

    label: int
    images: int
    reference: float
    other: float
    p: float
    significant: bool


@dataclass(frozen=True)
class Flips:
    """Indices of the images whose predicted class changes: right to wrong, wrong to right, wrong to wrong."""

    lost: np.ndarray
    gained: np.ndarray
    moved: np.ndarray


@dataclass(frozen=True)
class Change:
    """Changes of a model's predictions from a reference's on the same images.

    Attributes:
        agreement: percent of the images for which both predict the same class.
        confidence_shift: mean change of the confidence, in [-1, 1]; negative if the model is less confident.
        classes: the change in each class that has images.
    """

    test: McNemar
    flips: Flips
    agreement: float
    confidence_shift: float
    classes: tuple[ClassChange, ...]


def top_k_accuracy(predictions: Predictions, k: int = 1) -> Share:
    """Returns the share of images whose label is among the ``k`` largest logits, ties by class."""
    return _share(int((predictions.rank < k).sum()), len(predictions))


def _share(count: int, images: int) -> Share:
    interval = scipy.stats.binomtest(count, images).proportion_ci(method="wilson")
    return Share(count / images * 100, float(interval.low) * 100, float(interval.high) * 100, images)


def mcnemar(reference: np.ndarray, other: np.ndarray) -> McNemar:
    """McNemar's exact test (Psychometrika 12, 1947) of two bool arrays (n,), right or wrong on the same images.

    Raises:
        ValueError: the arrays differ in length.
    """
    if reference.shape != other.shape:
        raise ValueError(f"mcnemar takes arrays of equal shape, not {reference.shape} and {other.shape}")
    lost, gained = int((reference & ~other).sum()), int((other & ~reference).sum())
    p = scipy.stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return McNemar(lost, gained, float(p))


def compare_predictions(reference: Predictions, other: Predictions) -> Change:
    """Returns the changes from a reference's predictions to another model's.

    Raises:
        ValueError: the labels differ, so the images are not the same.
    """
    if not np.array_equal(reference.labels, other.labels):
        raise ValueError(f"the labels differ: {len(reference)} and {len(other)} predictions are not of the same images")
    changed = reference.predicted != other.predicted
    flips = (reference.right & ~other.right, other.right & ~reference.right, changed & ~reference.right & ~other.right)
    return Change(
        test=mcnemar(reference.right, other.right),
        flips=Flips(*(np.flatnonzero(flip) for flip in flips)),
        agreement=float((~changed).mean() * 100),
        confidence_shift=float((other.confidence - reference.confidence).mean()),
        classes=_class_changes(reference.right, other.right, reference.labels),
    )


def _class_changes(reference: np.ndarray, other: np.ndarray, labels: np.ndarray) -> tuple[ClassChange, ...]:
    classes = np.unique(labels)
    tests = [mcnemar(reference[labels == label], other[labels == label]) for label in classes]
    adjusted = scipy.stats.false_discovery_control([test.p for test in tests], method="bh")
    changes = []
    for label, test, p in zip(classes, tests, adjusted, strict=True):
        here = labels == label
        before, after = (float(model[here].mean() * 100) for model in (reference, other))
        changes.append(ClassChange(int(label), int(here.sum()), before, after, test.p, bool(p < 0.05)))
    return tuple(changes)


NO_DROP = Drop(0.0, 0.0, 0.0)  # of the reference itself


def paired_drop(reference: np.ndarray, other: np.ndarray, seed: int = 0, resamples: int = 10_000) -> Drop:
    """Returns the drop of top-1 from ``reference`` to ``other``, with a 95% percentile interval of a paired bootstrap.

    Both are bool arrays (n,), right or wrong on the same images. A resample is determined by how often each of three
    outcomes is drawn (only the reference right, only the other right, no difference). These counts are multinomial, so
    they are drawn directly.

    An outcome that did not occur cannot be drawn. If no image was lost, the upper end is raised to the exact bound for
    0 of n, 1 - 0.025^(1 / n) (Clopper and Pearson, 1934); if none was gained, the lower end is lowered likewise. For
    10,000 images the bound is 0.04 points.

    Raises:
        ValueError: the arrays differ in length or are empty.
    """
    if reference.shape != other.shape or not len(reference):
        raise ValueError(f"paired_drop takes non-empty arrays of equal shape, not {reference.shape} and {other.shape}")
    count = len(reference)
    lost, gained = np.mean(reference & ~other), np.mean(other & ~reference)
    draws = np.random.default_rng(seed).multinomial(count, [lost, gained, max(0.0, 1 - lost - gained)], size=resamples)
    drops = (draws[:, 0] - draws[:, 1]) / count * 100
    low, high = map(float, np.percentile(drops, [2.5, 97.5]))
    return widened(Drop(float(lost - gained) * 100, low, high), bool(lost > 0), bool(gained > 0), count)


def drop_between(reference: Predictions, other: Predictions, labeled: bool = True, seed: int = 0) -> Drop:
    """Returns the drop of top-1, as :func:`paired_drop`.

    Without labels, it is the percent of the images for which another class is predicted, with its 95% Wilson interval.
    """
    if labeled:
        return paired_drop(reference.right, other.right, seed)
    changed = _share(int((reference.predicted != other.predicted).sum()), len(reference))
    return Drop(changed.percent, changed.low, changed.high)


def unseen_points(count: int) -> float:
    """Returns the upper end of the exact 95% interval of a share of 0 of ``count`` images, in percent."""
    return (1 - 0.025 ** (1 / count)) * 100


def images_to_tell(points: float) -> int:
    """Returns the least number of images that can show a drop of at most ``points``: with none of them lost."""
    return math.ceil(math.log(0.025) / math.log1p(-min(points, 99) / 100))


def widened(drop: Drop, lost: bool, gained: bool, count: int, largest: float = 1.0) -> Drop:
    """Returns a drop with its bootstrap interval, widened if no image was lost or gained, as in :func:`paired_drop`.

    The interval stays within what is possible.

    Args:
        count: number of images.
        largest: the largest difference that an image may have; 1 if it is right or wrong.
    """
    unseen, limit = largest * unseen_points(count), largest * 100
    low = drop.low if gained else min(drop.low, drop.points - unseen)
    high = drop.high if lost else max(drop.high, drop.points + unseen)
    return Drop(drop.points, max(low, -limit), min(high, limit))
