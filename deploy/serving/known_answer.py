"""Known answers: an image and its logits, to check whether a server answers correctly.

Imports no large library but NumPy, because :mod:`deploy.probe` runs every few seconds.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Base64Bytes

from illama.errors import UserError
from illama.golden_answers import MAX_POSITIONS, Arithmetic, GoldenAnswers, repeat_pixels
from illama.structured_files import read_json

if TYPE_CHECKING:
    from illama.data.preprocessing import Preprocessing

TOLERANCE = 0.1  # of the logits without golden answers; other runtimes differ by much less, other networks by more


@dataclass(frozen=True)
class KnownAnswer:
    """An image and the network's output for it: logits or features, flattened.

    Attributes:
        image: PNG file; in base64 on disk.
        positions: the values of the output that are stored.
        logits: these values.
        tolerance: the largest Euclidean distance between right logits and the stored ones.
        seconds: time of the engine for this image.
    """

    image: Base64Bytes
    positions: list[int]
    logits: list[float]
    tolerance: float
    seconds: float

    @classmethod
    def create(
        cls, infer: Callable[[np.ndarray], np.ndarray], prepare: Callable[[io.BytesIO], np.ndarray], file: bytes
    ) -> KnownAnswer:
        """Returns a network's own answer for an image.

        Args:
            infer: images (1, ...) -> output (1, ...).
            prepare: PNG file -> input of the network, without the batch.
            file: the PNG file.
        """
        images = prepare(io.BytesIO(file))[None]
        infer(images)  # warm-up
        start = time.perf_counter()
        output = infer(images)[0].reshape(-1)
        seconds = time.perf_counter() - start
        positions = np.linspace(0, len(output) - 1, min(len(output), MAX_POSITIONS)).round().astype(int)
        logits = output[positions]
        tolerance = TOLERANCE * float(np.linalg.norm(logits.astype(np.float64)))
        return cls(file, positions.tolist(), logits.tolist(), tolerance, seconds)

    def with_golden(self, golden: GoldenAnswers, arithmetic: Arithmetic) -> KnownAnswer:
        """Returns this answer with PyTorch's logits, for the file of :func:`golden_file`."""
        tolerance = golden.distance(arithmetic)
        return replace(self, positions=golden.positions.tolist(), logits=golden.logits[0].tolist(), tolerance=tolerance)

    def matches(self, logits: np.ndarray) -> bool:
        """Whether a flattened output equals the known one within the tolerance."""
        if logits.ndim != 1 or len(logits) <= max(self.positions) or not np.isfinite(logits).all():
            return False
        return bool(np.linalg.norm(logits[self.positions] - np.asarray(self.logits)) <= self.tolerance)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({**asdict(self), "image": base64.b64encode(self.image).decode()}) + "\n")

    @classmethod
    def read(cls, path: Path) -> KnownAnswer:
        """Reads a file of :meth:`write`; raises UserError if it is missing or damaged."""
        answer = read_json(path, cls)
        numbers = [*answer.logits, answer.seconds, answer.tolerance]
        fit = len(answer.positions) == len(answer.logits) > 0 and min(answer.positions) >= 0
        if not (fit and np.isfinite(numbers).all() and answer.image):
            raise UserError(f"{path} is damaged: write the repository again")
        return answer


def golden_file(golden: GoldenAnswers, preprocessing: Preprocessing) -> bytes:
    """Returns a PNG file that the preprocessing of a bundle converts to its first golden input, exactly."""
    height, width = golden.facts.size
    image = repeat_pixels(golden.images[:1], golden.facts.size)[0]
    if golden.facts.mean and (short := preprocessing.resize):  # what the crop removes is added around the image
        box = (short, short) if isinstance(short, int) else short
        (_, top), (_, left) = preprocessing.crop_in(box)
        around = ((top, box[0] - height - top), (left, box[1] - width - left), (0, 0))
        image = np.pad(image, around, mode="edge")
    return _as_png(image)


def pattern_file(height: int, width: int) -> bytes:
    """Returns a PNG file of sine waves, with another wavelength and direction in each channel."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * rows + b * columns)) for a, b in ((1, 2), (3, -1), (-2, 4))]
    return _as_png((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))


def _as_png(image: np.ndarray) -> bytes:
    """Returns an image (height, width, channels) uint8 as a PNG file."""
    from PIL import Image  # not needed to read an answer

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()
