"""ONNX files in ONNX Runtime, on the CPU or in one of its execution providers for GPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from deploy.runtimes.engine import Engine
from illama.bundle import FUSED_ONNX
from illama.errors import UserError
from illama.graph.check_graph import check_graph
from illama.graph.emulate_half import Softmax, half_dtypes
from illama.graph.reader import load_graph
from illama.graph.session import cpu_session, emulated_session

PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


class OnnxRuntimeEngine(Engine):
    """An ONNX file in ONNX Runtime.

    On the CPU, a graph in half precision is rounded as a GPU does (:mod:`illama.graph.emulate_half`); ONNX Runtime
    itself computes it in float32 there.

    Args:
        path: path to the ONNX file.
        threads: number of threads of an operator on the CPU; 0 for one per core.
        provider: an execution provider for GPUs. Defaults to the CPU's.
        softmax: precision of the softmax inside attention, where the CPU emulates half precision.

    Raises:
        UserError: ONNX Runtime cannot load the file, or does not have the provider.
    """

    def __init__(self, path: Path, threads: int = 0, provider: str | None = None, softmax: Softmax = "float32") -> None:
        self._path = path
        self.runtime = f"onnxruntime {onnxruntime.__version__} {provider or 'CPU'}"
        if provider and provider not in onnxruntime.get_available_providers():
            raise UserError(
                f"ONNX Runtime has no {provider} here: install onnxruntime-gpu, or choose another --runtime"
            )
        check_graph(path)
        emulated = not provider and bool(half_dtypes(load_graph(path)))
        if provider or emulated:
            self.arithmetic = "tensorrt"
        if emulated:
            self.runtime += f", half precision emulated, softmax in {softmax}"
        try:
            if provider:
                self._session = gpu_session(path, provider)
            elif emulated:
                self._session = emulated_session(path, threads, softmax)
            else:
                self._session = cpu_session(path, threads, fused=path.name == FUSED_ONNX)
        except Exception as error:  # ONNX Runtime's exceptions have no other common base class
            raise UserError(f"ONNX Runtime cannot load {path}: {' '.join(str(error).split())}") from error
        self._input = self._session.get_inputs()[0].name

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32; UserError if the file cannot run."""
        try:
            return self._session.run(None, {self._input: images})[0]
        except Exception as error:  # ONNX Runtime's exceptions have no other common base class
            raise UserError(f"ONNX Runtime cannot run {self._path}: {error}") from error


def gpu_session(path: Path, provider: str) -> onnxruntime.InferenceSession:
    """Returns a session on a GPU; ONNX Runtime computes shapes on the CPU.

    Raises:
        UserError: the provider did not start, so that the CPU would run everything.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider, "CPUExecutionProvider"])
    if provider not in session.get_providers():
        raise UserError(f"{provider} does not start here: check that its CUDA libraries are installed")
    return session
