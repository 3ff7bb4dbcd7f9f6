"""Golden answers: small images, and the logits that PyTorch computes for them, which tell whether an engine is right.

A compiler of networks can be wrong without an error: it drops a mask, or swaps the rows of a batch. Golden answers are
in a bundle and beside each of its engines, as ``golden.safetensors``:

    images     (n, h, w, channels) uint8, at most 16 images of 32x32 pixels; no decoder is involved
    positions  (k,) int64: which logits of an image are stored, as indices into its flattened logits
    logits     (n, k) float32

The input of the network is each image with its pixels repeated (:meth:`GoldenAnswers.inputs`). The other fields of
:class:`GoldenAnswers` are JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from illama.bundle import GOLDEN, GoldenImages
from illama.errors import UserError

MAX_IMAGES, MAX_SIDE, MAX_POSITIONS = 16, 32, 1000
MAX_PIXELS = 1 << 25  # of the network's input or frame: 8K video
Arithmetic = Literal["float32", "bfloat16", "tensorrt"]
ONE_IMAGE = 2.0  # the error of a single image may exceed the tolerance, which is for all of them, by this factor
_METADATA = "golden_answers"


class WrongAnswerError(Exception):
    """Logits differ from the golden answers; the message says how, as the end of a sentence about the engine."""


@dataclass(frozen=True)
class GoldenFacts:
    """What is known about golden answers, besides their tensors.

    Attributes:
        source: whether the images are calibration images, made smaller, or noise.
        size: (height, width) of the network's input, or of the frames that it takes.
        mean: mean per channel of pixels scaled to 0..1; empty for a network that takes uint8 frames.
        std: standard deviation per channel, likewise.
        tolerances: how a runtime computes float operators -> the largest error of right logits
            (:func:`relative_error`): in float32, in bfloat16 (OpenVINO on a CPU that multiplies it), or as TensorRT
            does, in half precision. The last is provisional: no GPU has confirmed it yet.
    """

    source: GoldenImages
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tolerances: Mapping[Arithmetic, float]


@dataclass(frozen=True)
class GoldenAnswers:
    """Images and the logits of PyTorch; the shapes are those in the file (see the module)."""

    images: np.ndarray
    positions: np.ndarray
    logits: np.ndarray
    facts: GoldenFacts

    def inputs(self, batch: int) -> np.ndarray:
        """Returns a batch of :func:`to_inputs`: the images in order, and again from the first if it is larger."""
        return to_inputs(self.images[np.arange(batch) % len(self.images)], self.facts)

    def check(self, logits: np.ndarray, arithmetic: Arithmetic) -> float:
        """Compares the logits of :meth:`inputs` with the golden ones.

        Args:
            logits: (B, classes, ...), computed for ``inputs(B)``.
            arithmetic: how they were computed, which determines the tolerance.

        Returns:
            Their error (:func:`relative_error`).

        Raises:
            WrongAnswerError: they are of another shape, not finite, or the error exceeds the tolerance.
        """
        tolerance, found = self.facts.tolerances[arithmetic], logits.reshape(len(logits), -1)
        if found.shape[1] <= self.positions.max():
            raise WrongAnswerError(f"has {found.shape[1]} logits for an image, fewer than PyTorch")
        found, expected = found[:, self.positions], self.logits[np.arange(len(found)) % len(self.logits)]
        if bad := int((~np.isfinite(found).all(axis=1)).sum()):
            raise WrongAnswerError(f"computes logits that are not finite, for {bad} images in a batch of {len(found)}")
        errors = np.linalg.norm(found - expected, axis=1) / _spread(self.logits)
        total, wrong = float(np.sqrt((errors**2).mean())), np.flatnonzero(errors > ONE_IMAGE * tolerance)
        for image in wrong:
            others = np.linalg.norm(found[image] - self.logits, axis=1) / _spread(self.logits)
            if (other := int(others.argmin())) != image % len(self.logits) and others[other] <= ONE_IMAGE * tolerance:
                raise WrongAnswerError(f"mixes up the images of a batch: image {image} gets the logits of {other}")
        if len(wrong) or (total > tolerance and len(found) >= len(self.logits)):
            raise WrongAnswerError(
                f"computes other logits than PyTorch, for {len(wrong) or 'most'} images in a batch of {len(found)}: "
                f"the error is {max(total, errors.max()):.1%} of their spread, and {tolerance:.1%} is rounding"
            )
        return total

    def distance(self, arithmetic: Arithmetic) -> float:
        """Returns the largest Euclidean distance of the logits of one image that is within the tolerance."""
        return ONE_IMAGE * self.facts.tolerances[arithmetic] * _spread(self.logits)

    def write(self, folder: Path) -> None:
        """Writes ``golden.safetensors`` into a folder."""
        from safetensors.numpy import save

        tensors = {"images": self.images, "positions": self.positions, "logits": self.logits}
        # Not save_file, whose file only its owner may read.
        (folder / GOLDEN).write_bytes(save(tensors, {_METADATA: json.dumps(vars(self.facts))}))

    @classmethod
    def read(cls, path: Path) -> GoldenAnswers:
        """Reads a file of :meth:`write`; raises UserError if it is missing or damaged."""
        from safetensors import SafetensorError, safe_open  # not needed to compare logits

        from illama.structured_files import check_regular, parse_json

        check_regular(path)
        try:
            with safe_open(path, "np") as file:
                text = file.metadata()[_METADATA]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            facts = parse_json(text, GoldenFacts, f"the metadata of {path}")
            answers = cls(**tensors, facts=facts)
            valid = _is_valid(answers)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, OSError):
            valid = False
        if not valid:
            raise UserError(f"{path} is damaged: make the bundle again")
        return answers


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the error of logits (B, k), relative to their spread.

    The error is the distance of an image's logits from the expected ones, and the spread is that of the expected ones
    from their mean; both are root mean squares over the images. An error of 1 is that of equal logits for all classes.
    """
    return float(np.linalg.norm(found - expected) / len(found) ** 0.5 / _spread(expected))


def _spread(logits: np.ndarray) -> float:
    """Returns the root mean square, over the images, of the distance of an image's logits (B, k) from their mean."""
    around_mean = np.linalg.norm(logits - logits.mean(axis=1, keepdims=True))
    # Logits that are almost equal, of a network without training, are compared with their magnitude.
    return float(max(around_mean, 1e-3 * np.linalg.norm(logits), 1e-9) / len(logits) ** 0.5)


def to_inputs(images: np.ndarray, facts: GoldenFacts) -> np.ndarray:
    """Returns golden images (n, h, w, channels) uint8 as the network takes them.

    Returns:
        (n, channels, height, width) float32, normalized; or (n, height, width, channels) uint8 frames.
    """
    images = repeat_pixels(images, facts.size)
    if not facts.mean:
        return images
    mean, std = (np.array(values, np.float32) for values in (facts.mean, facts.std))
    normalized = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))


def repeat_pixels(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarges images (n, h, w, channels) to a size by repeating each pixel equally often, then cropping at the end."""
    for axis, length in enumerate(size, 1):
        times = -(-length // images.shape[axis])
        images = images.repeat(times, axis).take(range(length), axis)
    return images


def golden_size(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest (h, w) of golden images from which :func:`repeat_pixels` makes images of a size."""
    height, width = (-(-length // -(-length // MAX_SIDE)) for length in size)
    return height, width


def _is_valid(answers: GoldenAnswers) -> bool:
    """Whether the tensors and the facts of a file fit each other, and are in their bounds."""
    images, positions, logits, facts = answers.images, answers.positions, answers.logits, answers.facts
    count, height, width, channels = images.shape
    (stored,) = positions.shape
    return (
        images.dtype == np.uint8
        and positions.dtype == np.int64
        and logits.shape == (count, stored)
        and 1 <= count <= MAX_IMAGES
        and 1 <= min(height, width) <= max(height, width) <= MAX_SIDE
        and min(facts.size) >= 1
        and facts.size[0] * facts.size[1] <= MAX_PIXELS
        and channels in (1, 3)
        and len(facts.mean) == len(facts.std) in (0, channels)
        and 1 <= stored <= MAX_POSITIONS
        and int(positions.min()) >= 0
        and bool(np.isfinite(logits).all() and np.isfinite(facts.mean).all() and all(each > 0 for each in facts.std))
        and set(facts.tolerances) == {"float32", "bfloat16", "tensorrt"}
        and all(0 < each < 1 for each in facts.tolerances.values())
    )
