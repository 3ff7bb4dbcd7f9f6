"""Calibration of a model's probabilities: calibration error, reliability diagram, temperature scaling.

Calibration error is that of Guo et al. (arXiv 1706.04599, equation 3): images are sorted into bins by their largest
probability, the confidence, and in each bin the mean confidence is compared with the accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize

from deploy.runtimes.temperature import read_temperature
from eval.metrics.predictions import Predictions, check_predictions, log_probabilities
from illama.data.datasets import ImageData
from illama.data.preprocessing import Transform
from illama.inference import Infer, predict
from illama.training.distributed import ALONE, Processes

BINS = 15
_TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram.

    Attributes:
        low: lower end of its confidences, exclusive for bins of equal width.
        high: upper end of its confidences, inclusive.
        count: number of images in the bin, at least one.
        confidence: mean confidence of the images.
        accuracy: share of the images that are classified correctly, in [0, 1].
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """Calibration of the probabilities of one model.

    Attributes:
        ece: expected calibration error over 15 bins of equal width, in [0, 1].
        adaptive_ece: expected calibration error over 15 bins with equal numbers of images (Nixon et al., arXiv
            1904.01685), none of them empty or crowded.
        nll: mean negative log-likelihood of the label, in nats.
        brier: mean squared distance of the probabilities from the label's one-hot vector (Brier, 1950), in [0, 2].
        diagram: the non-empty bins of ``ece``.
    """

    ece: float
    adaptive_ece: float
    nll: float
    brier: float
    diagram: tuple[Bin, ...]


def reliability(predictions: Predictions, bins: int = BINS) -> Reliability:
    """Returns the calibration of at least one prediction; raises ValueError for fewer than one bin."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
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
    """Returns the non-empty bins of equal width, for confidences (images,) in [0, 1] and correctness (images,)."""
    edges = np.linspace(0, 1, bins + 1)
    places = np.digitize(confidence, edges[1:-1], right=True)
    return tuple(
        _bin(edges[place], edges[place + 1], confidence[places == place], right[places == place])
        for place in np.unique(places)
    )


def equal_mass_bins(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """Returns bins whose numbers of images differ by at most one, by confidence; at most one bin per image."""
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return tuple(_bin(confidence[part[0]], confidence[part[-1]], confidence[part], right[part]) for part in parts)


def _bin(low: float, high: float, confidence: np.ndarray, right: np.ndarray) -> Bin:
    return Bin(float(low), float(high), len(right), float(confidence.mean()), float(right.mean()))


def calibration_error(bins: tuple[Bin, ...]) -> float:
    """Returns the mean distance between confidence and accuracy, weighted by each bin's number of images."""
    total = sum(each.count for each in bins)
    return sum(each.count / total * abs(each.confidence - each.accuracy) for each in bins)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature that minimizes the negative log-likelihood of logits / T (Guo et al., section 4.2).

    The negative log-likelihood is convex in 1/T, so it has at most one minimum. The predicted classes do not change.

    Args:
        logits: (images, classes), of calibration images; never of those that the result is measured on.
        labels: (images,).

    Raises:
        ValueError: as :func:`eval.metrics.predictions.check_predictions`; or no temperature between 0.01 and 100 is
            best, as when all images are classified correctly.
    """
    check_predictions(logits, labels)
    if (logits.argmax(1) == labels).all():  # the likelihood grows with 1/T until it rounds to 1
        raise ValueError("every calibration image is right, so no temperature is best: give more images")
    low, high = np.log(_TEMPERATURES)

    def loss(log: float) -> float:
        return float(-log_probabilities(logits / np.exp(log))[np.arange(len(labels)), labels].mean())

    found = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-7})
    if not low + 1e-3 < found.x < high - 1e-3:
        raise ValueError("no temperature from 0.01 to 100 is best: give more calibration images")
    return float(np.exp(found.x))


def fit_temperatures(
    models: Mapping[str, Infer], data: ImageData, transform: Transform, images: int, group: Processes = ALONE
) -> tuple[dict[str, float], dict[str, str]]:
    """Fits a temperature for each model.

    Args:
        images: number of training images, evenly spaced; 0 to fit nothing.
        group: the group of processes; the main one fits for all.

    Returns:
        By model, its temperature; and in the main process, the reason if a model has none.

    Raises:
        UserError: there are fewer images.
    """
    found, failed = dict.fromkeys(models, 0.0), {}
    if group.main and images:
        logits, labels = predict(models, data.calibration(images), transform)
        for name, values in logits.items():
            try:
                # Four digits, so that a resumed run, or one on another machine, finds the same value.
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
        {name: "none is stored with its file" for name, value in stored.items() if value is None},
    )
