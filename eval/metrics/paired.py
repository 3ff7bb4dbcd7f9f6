"""How many images a model gets right, and what changes against a reference on the same images.

Top-1 alone hides changes: a model can get as many images right as another, and not the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats

from eval.metrics.predictions import Predictions


@dataclass(frozen=True)
class Share:
    """A share of images in percent, with a 95% interval (Wilson's, of a binomial proportion)."""

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.percent:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of whether two models are right equally often.

    Attributes:
        lost, gained: images that the reference alone, and that the other alone, gets right.
        p: chance of so unequal a split of those images if each were as likely to be lost as gained; two-sided, by
            the exact binomial distribution, for any number of images.
    """

    lost: int
    gained: int
    p: float


@dataclass(frozen=True)
class ClassChange:
    """What changes in one class.

    Attributes:
        images: of the class.
        reference, other: percent of them that each model gets right.
        p: McNemar's, of these images alone.
        significant: whether it remains so among all classes, with at most 5% false discoveries among those called
            significant (Benjamini and Hochberg, 1995).
    """

    label: int
    images: int
    reference: float
    other: float
    p: float
    significant: bool


@dataclass(frozen=True)
class Flips:
    """Indices of the images whose top-1 class changes: right to wrong, wrong to right, one wrong class to another."""

    lost: np.ndarray
    gained: np.ndarray
    moved: np.ndarray


@dataclass(frozen=True)
class Change:
    """A model against a reference on the same images.

    Attributes:
        agreement: percent of the images on which both name the same class.
        confidence_shift: mean change of the largest probability, in -1..1; negative for a model that is less sure.
        classes: one for each class that has images.
    """

    test: McNemar
    flips: Flips
    agreement: float
    confidence_shift: float
    classes: tuple[ClassChange, ...]


def top_k_accuracy(predictions: Predictions, k: int = 1) -> Share:
    """Share of the images whose label is among the ``k`` largest logits, of equal ones the lower class first."""
    right, images = int((predictions.rank < k).sum()), len(predictions)
    interval = scipy.stats.binomtest(right, images).proportion_ci(method="wilson")
    return Share(right / images * 100, float(interval.low) * 100, float(interval.high) * 100)


def mcnemar(reference: np.ndarray, other: np.ndarray) -> McNemar:
    """McNemar's exact test (Psychometrika 12, 1947) of two arrays of booleans (n,), right or wrong on the same images.

    Raises:
        ValueError: for arrays of different length.
    """
    if reference.shape != other.shape:
        raise ValueError("McNemar's test compares two arrays over the same images")
    lost, gained = int((reference & ~other).sum()), int((other & ~reference).sum())
    p = scipy.stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return McNemar(lost, gained, float(p))


def compare_predictions(reference: Predictions, other: Predictions) -> Change:
    """What changes from the predictions of a reference to another model's.

    Raises:
        ValueError: they are not of the same images.
    """
    if not np.array_equal(reference.labels, other.labels):
        raise ValueError(f"predictions of {len(reference)} and {len(other)} images are not of the same ones")
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


@dataclass(frozen=True)
class Drop:
    """Points of top-1 lost (negative: gained), with a 95% interval."""

    points: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


NO_DROP = Drop(0.0, 0.0, 0.0)  # of the reference against itself


def paired_drop(reference: np.ndarray, other: np.ndarray, seed: int = 0, resamples: int = 10_000) -> Drop:
    """The drop from ``reference`` to ``other``, with a percentile interval from a paired bootstrap.

    Both are booleans (n,), right or wrong on the same images. A resample of n images is summed up by how
    often each of three things is drawn (only the reference right, only the other right, no difference),
    and those counts are multinomial: the draw is exact, and takes no n x resamples table.

    What never occurred, no resample can draw, however few the images are. There the interval reaches as far as the
    exact one for none of n does (Clopper and Pearson, 1934): by 1 - 0.025^(1 / n), 0.04 points for 10,000 images.

    Raises:
        ValueError: for arrays of different or zero length.
    """
    if reference.shape != other.shape or not len(reference):
        raise ValueError("paired_drop compares two non-empty arrays over the same images")
    count = len(reference)
    lost, gained = np.mean(reference & ~other), np.mean(other & ~reference)
    draws = np.random.default_rng(seed).multinomial(count, [lost, gained, max(0.0, 1 - lost - gained)], size=resamples)
    drops = (draws[:, 0] - draws[:, 1]) / count * 100
    low, high = np.percentile(drops, [2.5, 97.5])
    return widened((lost - gained) * 100, low, high, lost > 0, gained > 0, unseen_points(count))


def unseen_points(count: int) -> float:
    """Upper end of the exact 95% interval of a share, in percent, of which ``count`` images show none."""
    return (1 - 0.025 ** (1 / count)) * 100


def widened(points: float, low: float, high: float, lost: bool, gained: bool, unseen: float) -> Drop:
    """A bootstrap's interval, as far as ``unseen`` points on the side of what no image shows."""
    return Drop(
        float(points),
        float(low if gained else min(low, points - unseen)),
        float(high if lost else max(high, points + unseen)),
    )
