"""Run an exported model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from illama.bundle import FUSED_ONNX
from illama.errors import UserError
from illama.onnx_session import cpu_session


class OnnxRuntimeEngine:
    """An ONNX file in ONNX Runtime on the CPU.

    Args:
        path: the ONNX file.

    Raises:
        UserError: if ONNX Runtime cannot load the file.
    """

    runtime = f"onnxruntime {onnxruntime.__version__} CPU"

    def __init__(self, path: Path) -> None:
        try:
            self._session = cpu_session(path, fused=path.name == FUSED_ONNX)
        except Exception as error:  # its exceptions share no base class but this one
            raise UserError(f"ONNX Runtime cannot load {path}: {' '.join(str(error).split())}") from error
        self._input = self._session.get_inputs()[0].name

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return self._session.run(None, {self._input: images})[0]
