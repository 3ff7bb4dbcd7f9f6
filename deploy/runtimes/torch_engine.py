"""Networks in PyTorch, eager or compiled."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from deploy.runtimes.engine import Engine
from illama.inference import torch_infer


class TorchEngine(Engine):
    """A network in PyTorch: the float reference, or one quantized by torchao.

    Args:
        network: moved to ``device``, and set to evaluation mode.
        device: cuda or cpu. Defaults to cuda if there is a GPU.
        compiled: whether to use torch.compile.
    """

    def __init__(self, network: torch.nn.Module, device: str | None = None, compiled: bool = False) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network = network.eval().to(device)
        self.runtime = f"torch {torch.__version__} {device}{', compiled' * compiled}"
        self._infer = torch_infer(cast(torch.nn.Module, torch.compile(network)) if compiled else network)

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return self._infer(images)
