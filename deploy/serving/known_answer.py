"""Known answers: a synthetic image and its logits, to check whether a server answers correctly.

Imports no large library but NumPy, because :mod:`deploy.probe` runs every few seconds.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from illama.errors import UserError
from illama.structured_files import read_json

TOLERANCE = 0.1  # of the largest logit; other runtimes and float dtypes differ by much less, other networks by more


@dataclass(frozen=True)
class KnownAnswer:
    """An image and its logits.

    Attributes:
        image: PNG file in base64.
        logits: (classes,).
        seconds: time of the engine for this image.
    """

    image: str
    logits: list[float]
    seconds: float

    @classmethod
    def create(
        cls,
        infer: Callable[[np.ndarray], np.ndarray],
        prepare: Callable[[io.BytesIO], np.ndarray],
        size: tuple[int, int],
    ) -> KnownAnswer:
        """Runs a network on an image of a fixed pattern.

        Args:
            infer: images (1, ...) -> logits (1, classes).
            prepare: PNG file -> input of the network, without the batch.
            size: (height, width) of the image.
        """
        file = _pattern(*size)
        images = prepare(io.BytesIO(file))[None]
        infer(images)  # warm-up
        start = time.perf_counter()
        logits = infer(images)[0]
        seconds = time.perf_counter() - start
        return cls(base64.b64encode(file).decode(), [float(value) for value in logits], seconds)

    @property
    def file(self) -> bytes:
        """The image as a PNG file."""
        return base64.b64decode(self.image)

    def matches(self, logits: np.ndarray) -> bool:
        """Whether logits (classes,) equal the known ones within :data:`TOLERANCE`."""
        expected = np.asarray(self.logits)
        if logits.shape != expected.shape or not np.isfinite(logits).all():
            return False
        return bool(np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max())

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> KnownAnswer:
        """Reads a file of :meth:`write`; raises UserError if it is missing or damaged."""
        answer = read_json(path, cls)
        if not np.isfinite([*answer.logits, answer.seconds]).all() or not _is_base64(answer.image):
            raise UserError(f"{path} is damaged: write the repository again")
        return answer


def _is_base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except ValueError:
        return False


def _pattern(height: int, width: int) -> bytes:
    """Returns a PNG file of sine waves, with another wavelength and direction in each channel."""
    from PIL import Image  # not needed to read an answer

    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * rows + b * columns)) for a, b in ((1, 2), (3, -1), (-2, 4))]
    file = io.BytesIO()
    Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
