"""A picture and the logits that a network gave for it: what tells a server that answers from one that is only there.

Imports nothing of this project and no PyTorch, for :mod:`deploy.probe` runs every few seconds.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 0.1  # of the largest logit: another runtime or float type is well within it, and another network is not


@dataclass(frozen=True)
class KnownAnswer:
    """A picture and its logits.

    Attributes:
        image: a PNG file, in base64.
        logits: (classes,).
        seconds: that the engine took for this one image.
    """

    image: str
    logits: list[float]
    seconds: float

    @classmethod
    def ask(
        cls,
        infer: Callable[[np.ndarray], np.ndarray],
        prepare: Callable[[io.BytesIO], np.ndarray],
        size: tuple[int, int],
    ) -> KnownAnswer:
        """What a network answers to a picture of a fixed pattern.

        Args:
            infer: images (1, ...) -> logits (1, classes).
            prepare: a PNG file -> what the network takes, without the batch.
            size: (height, width) of the picture.
        """
        file = _pattern(*size)
        images = prepare(io.BytesIO(file))[None]
        infer(images)  # the first call prepares kernels
        start = time.perf_counter()
        logits = infer(images)[0]
        taken = time.perf_counter() - start
        return cls(base64.b64encode(file).decode(), [float(value) for value in logits], taken)

    @property
    def file(self) -> bytes:
        """The picture, as a PNG file."""
        return base64.b64decode(self.image)

    def matches(self, logits: np.ndarray) -> bool:
        """Whether logits (classes,) are this answer, within :data:`TOLERANCE`."""
        expected = np.asarray(self.logits)
        if logits.shape != expected.shape or not np.isfinite(logits).all():
            return False
        return bool(np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max())

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> KnownAnswer:
        """What :meth:`write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text())
        return cls(**values)


def _pattern(height: int, width: int) -> bytes:
    """A PNG file of smooth waves, of another length and direction in each colour."""
    from PIL import Image  # not where an answer is only read

    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * rows + b * columns)) for a, b in ((1, 2), (3, -1), (-2, 4))]
    file = io.BytesIO()
    Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
