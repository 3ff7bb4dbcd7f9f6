"""How far a model's probabilities can be trusted: calibration error, reliability diagram, temperature scaling.

Calibration error is that of Guo et al. (arXiv 1706.04599, equation 3): the images are sorted into bins by the
largest probability, and in each bin its mean, the confidence, is held against the share that is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize

from deploy.runtimes.temperature import read_temperature
from eval.metrics.predictions import Predictions, check_predictions, log_probabilities, refuse_overflow
from illama.data.datasets import ImageData, Transform
from illama.inference import Infer, predict
from illama.training.distributed import ALONE, Processes

BINS = 15
_TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram.

    Attributes:
        low, high: the confidences it covers; from above ``low`` to ``high`` where bins are of equal width.
        count: images in it, at least one.
        confidence: mean of their largest probability.
        accuracy: share of them that is right, in 0..1.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How far the probabilities of one model can be trusted.

    Attributes:
        ece: expected calibration error over 15 bins of equal width, in 0..1.
        adaptive_ece: the same over 15 bins of equally many images (Nixon et al., arXiv 1904.01685), which no empty
            and no crowded bin can distort.
        nll: mean negative log-likelihood of the right class, in nats.
        brier: mean squared distance of the probabilities from the label's one-hot vector (Brier, 1950), in 0..2.
        diagram: the bins of ``ece`` that have images.
    """

    ece: float
    adaptive_ece: float
    nll: float
    brier: float
    diagram: tuple[Bin, ...]


def reliability(predictions: Predictions, bins: int = BINS) -> Reliability:
    """Calibration of predictions, at least one; ValueError for fewer than one bin."""
    if bins < 1:
        raise ValueError(f"calibration error takes at least one bin, not {bins}")
    confidence, right = predictions.confidence, predictions.right
    equal_width = equal_width_bins(confidence, right, bins)
    return Reliability(
        ece=calibration_error(equal_width),
        adaptive_ece=calibration_error(equal_mass_bins(confidence, right, bins)),
        nll=float(-predictions.log_likelihood.mean()),
        brier=float(predictions.brier.mean()),
        diagram=equal_width,
    )


def equal_width_bins(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """The bins that have images, of confidences (images,) in 0..1 and what was right (images,)."""
    edges = np.linspace(0, 1, bins + 1)
    places = np.digitize(confidence, edges[1:-1], right=True)
    return tuple(
        _bin(edges[place], edges[place + 1], confidence[places == place], right[places == place])
        for place in np.unique(places)
    )


def equal_mass_bins(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """Bins of equally many images up to one, in the order of their confidence; fewer bins if there are fewer images."""
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return tuple(_bin(confidence[part[0]], confidence[part[-1]], confidence[part], right[part]) for part in parts)


def _bin(low: float, high: float, confidence: np.ndarray, right: np.ndarray) -> Bin:
    return Bin(float(low), float(high), len(right), float(confidence.mean()), float(right.mean()))


def calibration_error(bins: tuple[Bin, ...]) -> float:
    """Mean distance of confidence from accuracy, each bin weighted by its images."""
    total = sum(each.count for each in bins)
    return sum(each.count / total * abs(each.confidence - each.accuracy) for each in bins)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the images, in nats."""
    return float(-log_probabilities(logits)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What to divide logits by so that their negative log-likelihood is least (Guo et al., section 4.2).

    The likelihood is convex in 1/T, so it has one minimum at most. No image's class changes by it.

    Args:
        logits, labels: of calibration images, never of those that the result is measured on.

    Raises:
        ValueError: see :func:`eval.metrics.predictions.check_predictions`; no best temperature between 0.01 and 100, as
            when every image is right.
    """
    check_predictions(logits, labels)
    if (logits.argmax(1) == labels).all():  # the likelihood grows until it rounds to 1, wherever that is
        raise ValueError("no temperature fits best where every image is right: give more calibration images")
    low, high = np.log(_TEMPERATURES)
    found = scipy.optimize.minimize_scalar(
        lambda log: negative_log_likelihood(logits / np.exp(log), labels),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-7},
    )
    if not low + 1e-3 < found.x < high - 1e-3:
        raise ValueError("no temperature fits best: give more calibration images, some right and some wrong")
    return float(np.exp(found.x))


def fit_temperatures(
    models: Mapping[str, Infer], data: ImageData, transform: Transform, images: int, group: Processes = ALONE
) -> tuple[dict[str, float], dict[str, str]]:
    """The temperature of each model that has one, and why another has none, by the model's name.

    Args:
        images: of the training split, evenly spaced; 0 to fit nothing.
        group: of these processes, the main one fits for all, and alone has the reasons.

    Raises:
        UserError: a model's logits are not finite, or there are not so many images.
    """
    found, failed = dict.fromkeys(models, 0.0), {}
    if group.main and images:
        logits, labels = predict(models, data.calibration(images), transform)
        refuse_overflow(logits)
        for name, values in logits.items():
            try:
                # Four digits, so that a run that is taken up again, or elsewhere, finds the same.
                found[name] = float(f"{fit_temperature(values, labels):.4g}")
            except ValueError as error:
                failed[name] = str(error)
    group.barrier()
    agreed = dict(zip(found, group.sum(*found.values()), strict=True))  # the others add zeros
    return {name: value for name, value in agreed.items() if value}, failed


def stored_temperatures(paths: Mapping[str, Path]) -> tuple[dict[str, float], dict[str, str]]:
    """Returns the temperatures stored with the files of models, in the form of :func:`fit_temperatures`."""
    stored = {name: read_temperature(path) for name, path in paths.items()}
    return (
        {name: value for name, value in stored.items() if value is not None},
        {name: "none is stored with it" for name, value in stored.items() if value is None},
    )
