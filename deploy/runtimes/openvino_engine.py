"""ONNX files in OpenVINO, on the CPU."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from deploy.rewrites.openvino_graph import has_matrix_unit, select_rewrites
from deploy.runtimes.engine import Engine
from illama.bundle import CPU_ONNX
from illama.errors import UserError
from illama.golden_answers import Arithmetic
from illama.graph.reader import has_4bit_activations, load_graph, to_bytes
from illama.graph.writer import has_external_data, save_graph
from illama.hardware import products_saturate, usable_cores

_ARITHMETIC: dict[str, Arithmetic] = {"f32": "float32", "bf16": "bfloat16"}


def _read(core: Any, model: ir.Model) -> Any:
    """Returns a graph as OpenVINO's; external data, which a rewrite may have changed, passes through a file."""
    if not has_external_data(model):
        return core.read_model(to_bytes(model))
    with tempfile.TemporaryDirectory() as folder:  # OpenVINO maps the file, which exists until it is unmapped
        save_graph(model, Path(folder) / CPU_ONNX)
        return core.read_model(Path(folder) / CPU_ONNX)


@cache
def openvino_core() -> Any:
    """Returns OpenVINO's core, one for the whole process.

    A core's CPU plugin gives the thread a signal stack with room for AMX's registers, and restores the previous stack
    when the core is destroyed. If that stack was another core's, it may be freed by then, and the next signal that
    Python handles (Ctrl-C, the end of a data loader's worker) is a segmentation fault.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    import openvino

    return openvino.Core()


class OpenVinoEngine(Engine):
    """An ONNX file in OpenVINO on the CPU.

    On a CPU that multiplies bfloat16 (AMX), OpenVINO computes the float32 operators of the graph in bfloat16;
    ``precision="f32"`` prevents this, at half the speed. Integer operators are not affected. On a CPU whose 8-bit
    products can overflow (:func:`illama.hardware.products_saturate`), integers are multiplied in float32.

    Attributes:
        floats: the dtype in which float32 operators are computed.

    Args:
        path: path to the ONNX file.
        threads: number of threads; 0 for one per core.
        precision: "f32", "bf16" or "f16", the dtype for floating-point operators. Defaults to OpenVINO's choice.

    Raises:
        UserError: OpenVINO is not installed or cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 0, precision: str | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise UserError("OpenVINO is not installed: pip install openvino, or --runtime onnxruntime") from error
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or usable_cores()}
        if products_saturate():
            # Of OpenVINO's CPU plugin, undocumented: integers are multiplied in float32.
            settings["LP_TRANSFORMS_MODE"] = False
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        model, core = load_graph(path), openvino_core()
        if has_4bit_activations(model):  # OpenVINO 2026.4 corrupts its memory while it compiles them
            raise UserError(f"OpenVINO cannot run the 4-bit activations of {path}: use --runtime onnxruntime")
        floats = precision or core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        for rewrite in select_rewrites(floats == "bf16", has_matrix_unit()):
            rewrite(model)
        try:
            compiled = core.compile_model(_read(core, model), "CPU", settings)
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot load {path}: {' '.join(str(error).split())[:300]}") from error
        self.floats = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        self.arithmetic = _ARITHMETIC.get(self.floats, "tensorrt")
        self.runtime = f"openvino {openvino.__version__.split('-')[0]} CPU, {self.floats}"
        self._request = compiled.create_infer_request()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return np.array(self._request.infer({0: images}, share_inputs=True)[0])
