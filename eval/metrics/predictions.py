"""What the measurements take from logits, image by image: as large for a thousand classes as for ten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy.special

from illama.errors import UserError


@dataclass(frozen=True)
class Predictions:
    """What one model says of n images; every array is (n,).

    Attributes:
        labels: the right class, int64.
        predicted: the class of the largest logit; of equal logits the lower class. int64.
        rank: classes that come before the label in the order of the logits, equal ones by their number; int64.
        confidence: largest probability, float64.
        log_likelihood: log of the label's probability, in nats; float64.
        brier: squared distance of the probabilities from the label's one-hot vector (Brier, 1950), in 0..2; float64.
    """

    labels: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    log_likelihood: np.ndarray
    brier: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is the label, booleans."""
        return self.rank == 0

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Predictions:
        """Those of logits (n, classes), whose probabilities are the softmax of logits / ``temperature``.

        Raises:
            ValueError: see :func:`check_predictions`; a temperature that is not above 0.
        """
        check_predictions(logits, labels)
        if not 0 < temperature < np.inf:
            raise ValueError(f"a temperature is above 0, not {temperature}")
        images = np.arange(len(labels))
        own = logits[images, labels][:, None]
        before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
        scaled = logits.astype(np.float64) / temperature
        given = probabilities(scaled)
        confidence = given.max(1)
        given[images, labels] -= 1
        return cls(
            labels=labels.astype(np.int64),
            predicted=logits.argmax(1),
            rank=before.sum(1),
            confidence=confidence,
            log_likelihood=log_probabilities(scaled)[images, labels],
            brier=(given**2).sum(1),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Predictions]) -> Predictions:
        """Those of all the images of ``parts``, in order; ValueError if there are none."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass(frozen=True)
class Evaluated:
    """Predictions of one model over a split.

    Attributes:
        plain: predictions from the logits.
        scaled: predictions from the logits divided by the model's temperature; None if it has none.
    """

    plain: Predictions
    scaled: Predictions | None = None


def check_predictions(logits: np.ndarray, labels: np.ndarray) -> None:
    """Logits (images, classes) with one label (images,) each, finite and at least one of them.

    Raises:
        ValueError: they are not.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} are not those of one set of images")
    check_finite(logits)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")


def check_finite(logits: np.ndarray) -> None:
    """ValueError unless all logits (images, ...) are finite; those of a model that overflows are not."""
    broken = ~np.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))
    if broken.any():
        raise ValueError(f"{int(broken.sum())} of {len(logits)} images have logits not finite")


def refuse_overflow(logits: Mapping[str, np.ndarray]) -> None:
    """UserError for a model, by its name, whose logits are not finite."""
    for name, values in logits.items():
        try:
            check_finite(values)
        except ValueError as error:
            raise UserError(f"{name}: {error}: leave it out, or quantize it by another scheme") from error


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of (images, classes), float64."""
    return scipy.special.softmax(logits.astype(np.float64), axis=1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of (images, classes), float64: exact where a probability is too small to be a number."""
    return scipy.special.log_softmax(logits.astype(np.float64), axis=1)
