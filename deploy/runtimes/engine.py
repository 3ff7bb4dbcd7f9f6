"""The interface of an opened model, the same in every runtime."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """Whatever runs a model.

    Attributes:
        runtime: what it is, with its version, device and precision.
    """

    runtime: str

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images, (B, C, H, W) float32 or whatever else the model takes -> logits (B, classes) float32."""

    def close(self) -> None:
        """Keep what makes the next start quicker, where a runtime has such a thing."""
        return None
