"""The interface of an opened model, the same in every runtime."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from illama.golden_answers import Arithmetic


class Engine(Protocol):
    """A model that a runtime has loaded.

    Attributes:
        runtime: name of the runtime, with its version, device and precision.
        arithmetic: how it computes float operators, which determines the tolerance for its answers.
        batches: the smallest batch that it takes, and a large one, at which its answers are verified.
        verified: whether its golden answers were right; False if it has none.
    """

    runtime: str
    arithmetic: Arithmetic = "float32"
    batches: tuple[int, int] = (1, 8)
    verified: bool = False

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32, or the model's own input -> logits (B, classes) float32."""

    def close(self) -> None:
        """Stores the runtime's cache of compiled kernels, if it has one, so that the next start is faster."""
        return None
