"""Predictions of a model: the few numbers per image that metrics need, independent of the number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy.special

from illama.errors import UserError


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model for n images; every array is (n,).

    Attributes:
        labels: the correct class, int64.
        predicted: the class of the largest logit, the lower class if logits are equal; int64.
        rank: number of classes that precede the label in descending order of logits, ties by class; int64.
        confidence: the largest probability, float64.
        log_likelihood: log of the label's probability, in nats; float64.
        brier: squared distance of the probabilities from the label's one-hot vector (Brier, 1950), in [0, 2]; float64.
    """

    labels: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    log_likelihood: np.ndarray
    brier: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is the label; bool."""
        return self.rank == 0

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Predictions:
        """Returns the predictions for logits (n, classes); probabilities are softmax(logits / ``temperature``).

        Raises:
            ValueError: as :func:`check_predictions`; or the temperature is not above 0.
        """
        check_predictions(logits, labels)
        if not 0 < temperature < np.inf:
            raise ValueError(f"temperature must be finite and above 0, not {temperature}")
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
        """Returns the predictions for the images of all ``parts``, in order; raises ValueError if there are none."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass(frozen=True)
class NotFinite:
    """What is left of a model whose logits are not finite for some images, as when half precision overflows.

    Attributes:
        images: number of these images.
        of: number of all images.
    """

    images: int
    of: int

    def __str__(self) -> str:
        return f"{self.images:,} of {self.of:,} images have logits that are not finite"


@dataclass(frozen=True)
class Evaluated:
    """Predictions of one model over a split.

    Attributes:
        plain: predictions from the logits.
        scaled: predictions from the logits divided by the model's temperature; None if it has none.
        powers: (n, 3) float64: for each image the sum of the squares of the reference's output (logits or features), of
            the difference from it, and of the own output; None without a reference.
    """

    plain: Predictions
    scaled: Predictions | None = None
    powers: np.ndarray | None = None

    @property
    def sqnr(self) -> float | None:
        """SQNR of the output in dB over all images; None without a reference, or if the outputs are equal."""
        if self.powers is None:
            return None
        signal, noise, _ = self.powers.sum(0)
        return float(10 * np.log10(signal / noise)) if signal and noise else None

    @property
    def cosine(self) -> float | None:
        """Mean over the images of the cosine similarity with the reference's output; None without a reference."""
        if self.powers is None:
            return None
        signal, noise, own = self.powers.T
        lengths = np.sqrt(signal * own)
        products = (signal + own - noise) / 2
        return float(np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0).mean())


def check_predictions(logits: np.ndarray, labels: np.ndarray) -> None:
    """Checks logits (images, classes) and labels (images,).

    Raises:
        ValueError: the shapes do not match, there are no images, a logit is not finite, or a label is not a class.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not match, or are empty")
    if found := count_not_finite(logits):
        raise ValueError(str(found))
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")


def count_not_finite(logits: np.ndarray) -> NotFinite | None:
    """Returns how many images of (images, ...) have a logit that is not finite; None if none has."""
    broken = int((~np.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))).sum())
    return NotFinite(broken, len(logits)) if broken else None


def refuse_not_finite(results: Mapping[str, Evaluated | NotFinite]) -> dict[str, Evaluated]:
    """Returns the results; raises UserError, with the model's name, if a model has none."""
    for name, result in results.items():
        if isinstance(result, NotFinite):
            raise UserError(f"{name}: {result}: leave it out, or quantize it with another scheme")
    return {name: result for name, result in results.items() if isinstance(result, Evaluated)}


def refuse_overflow(logits: Mapping[str, np.ndarray]) -> None:
    """Raises UserError, with the model's name, if a model has logits that are not finite."""
    refuse_not_finite({name: found for name, values in logits.items() if (found := count_not_finite(values))})


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax of logits (images, classes), float64."""
    return scipy.special.softmax(logits.astype(np.float64), axis=1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the log-softmax of logits (images, classes), float64; exact where a probability underflows."""
    return scipy.special.log_softmax(logits.astype(np.float64), axis=1)
