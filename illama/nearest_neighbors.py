"""Classifies images by features: the quality of a network without a classifier, in the terms of one with classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch.utils.data import Dataset

from illama.data.datasets import Sample
from illama.data.preprocessing import Transform
from illama.inference import Infer, predict

NEIGHBORS, TEMPERATURE = 20, 0.07  # as DINO is evaluated (arXiv 2104.14294, appendix F.1)


@dataclass(frozen=True)
class NearestNeighbors:
    """A weighted k-nearest-neighbor classifier (Wu et al., arXiv 1805.01978, section 3.4).

    Each of the 20 images whose features are the most similar votes for its class, with exp(cosine / 0.07).

    Attributes:
        gallery: features of m images, (m, width) float32 of length 1.
        classes: index of each image's class, (m,) int64.
        count: number of classes.
    """

    gallery: np.ndarray
    classes: np.ndarray
    count: int

    @classmethod
    def of(cls, infer: Infer, images: Dataset[Sample], transform: Transform, classes: int = 0) -> Self:
        """Returns the classifier with the features of images; without ``classes`` (their number), each is a class."""
        found, labels = predict({"": lambda batch: unit_features(infer(batch))}, images, transform)
        if classes:
            return cls(found[""], labels, classes)
        return cls(found[""], np.arange(len(labels)), len(labels))

    def similarities(self, features: np.ndarray) -> np.ndarray:
        """Returns cosine / 0.07 of features (n, ...) with those of the m images, (n, m) float64."""
        return (unit_features(features) @ self.gallery.T).astype(np.float64) / TEMPERATURE

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Returns the logarithm of each class's votes, for features (n, ...): (n, classes) float64."""
        similar = self.similarities(features)
        nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBORS]
        votes = np.full((len(features), self.count), np.exp(-3 / TEMPERATURE))  # less than any neighbor's
        rows = np.arange(len(features))[:, None]
        np.add.at(votes, (rows, self.classes[nearest]), np.exp(similar[rows, nearest] - 1 / TEMPERATURE))
        return np.log(votes)


Classifier = Callable[[np.ndarray], np.ndarray]  # a network's output (n, ...) -> logits (n, classes)


def as_it_is(logits: np.ndarray) -> np.ndarray:
    """The :data:`Classifier` of a network whose output is logits."""
    return logits


def classified(infer: Infer, classifier: Classifier) -> Infer:
    """Returns a function from images to logits; features, which may be much larger, are not kept."""
    return lambda images: classifier(infer(images))


def unit_features(features: np.ndarray) -> np.ndarray:
    """Returns features (n, width), or the mean over the tokens of (n, tokens, width), as vectors of length 1."""
    pooled = features.astype(np.float32) if features.ndim == 2 else features.mean(axis=1, dtype=np.float32)
    return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), np.finfo(np.float32).tiny)
