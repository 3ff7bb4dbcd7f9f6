"""The interface of an opened model, the same in every runtime."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """A model that a runtime has loaded.

    Attributes:
        runtime: name of the runtime, with its version, device and precision.
    """

    runtime: str

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32, or the model's own input -> logits (B, classes) float32."""

    def close(self) -> None:
        """Stores the runtime's cache of compiled kernels, if it has one, so that the next start is faster."""
        return None
