"""ONNX files in ONNX Runtime, on the CPU or in one of its execution providers for GPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from deploy.runtimes.engine import Engine
from illama.bundle import FUSED_ONNX
from illama.errors import UserError
from illama.graph.session import cpu_session

PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


class OnnxRuntimeEngine(Engine):
    """An ONNX file in ONNX Runtime.

    Args:
        path: the ONNX file.
        threads: within an operator on the CPU; 0 for one a core.
        provider: an execution provider for GPUs; the CPU's if not given.

    Raises:
        UserError: if ONNX Runtime cannot load the file, or has no such provider here.
    """

    def __init__(self, path: Path, threads: int = 0, provider: str | None = None) -> None:
        self.runtime = f"onnxruntime {onnxruntime.__version__} {provider or 'CPU'}"
        if provider and provider not in onnxruntime.get_available_providers():
            raise UserError(
                f"this ONNX Runtime has no {provider}: install onnxruntime-gpu, or choose another --runtime"
            )
        try:
            self._session = (
                gpu_session(path, provider) if provider else cpu_session(path, threads, fused=path.name == FUSED_ONNX)
            )
        except Exception as error:  # its exceptions share no base class but this one
            raise UserError(f"ONNX Runtime cannot load {path}: {' '.join(str(error).split())}") from error
        self._input = self._session.get_inputs()[0].name

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return self._session.run(None, {self._input: images})[0]


def gpu_session(path: Path, provider: str) -> onnxruntime.InferenceSession:
    """A session on a GPU; ONNX Runtime leaves arithmetic with shapes to the CPU.

    Raises:
        UserError: if the provider did not start and everything would run on the CPU.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider, "CPUExecutionProvider"])
    if provider not in session.get_providers():
        raise UserError(f"{provider} does not start here: see that its CUDA libraries are installed")
    return session
