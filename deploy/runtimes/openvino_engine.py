"""ONNX files in OpenVINO, on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deploy.rewrites.openvino_graph import fitting_rewrites, has_matrix_unit
from deploy.runtimes.engine import Engine
from illama.errors import UserError
from illama.graph.reader import load_graph
from illama.inference import usable_cores


@cache
def openvino_core() -> Any:
    """OpenVINO's core, one for the whole process.

    A core's CPU plugin gives the thread a stack for signals with room for AMX's registers, and puts back the one before
    it when the core goes. If that was another core's, it may be freed by then, and the next signal that Python handles
    (Ctrl-C, the end of a data loader's worker) is a segmentation fault.

    Raises:
        ImportError: if OpenVINO is not installed.
    """
    import openvino

    return openvino.Core()


class OpenVinoEngine(Engine):
    """An ONNX file in OpenVINO on the CPU.

    Where the CPU multiplies bfloat16 (AMX), OpenVINO computes in that what the graph has in float32; ``precision``
    "f32" keeps to the graph, at half the speed. Integers stay integers.

    Attributes:
        floats: the type that it computes in where the graph has float32.

    Args:
        path: the ONNX file.
        threads: in all; 0 for one a core.
        precision: "f32", "bf16" or "f16" for what the graph has in floating point; OpenVINO's choice if not given.

    Raises:
        UserError: if OpenVINO is not installed or cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 0, precision: str | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise UserError("OpenVINO is not installed: pip install openvino, or --runtime onnxruntime") from error
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or usable_cores()}
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        model, core = load_graph(path), openvino_core()
        floats = precision or core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        for rewrite in fitting_rewrites(floats == "bf16", has_matrix_unit()):
            rewrite(model)
        try:
            compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot load {path}: {' '.join(str(error).split())[:300]}") from error
        self.floats = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        self.runtime = f"openvino {openvino.__version__.split('-')[0]} CPU, {self.floats}"
        self._request = compiled.create_infer_request()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return np.array(self._request.infer({0: images}, share_inputs=True)[0])
