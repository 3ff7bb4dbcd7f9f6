"""ONNX Runtime sessions on the CPU, with the same options everywhere in this project."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from illama.bundle import FUSED_ONNX
from illama.graph.check_graph import check_graph
from illama.graph.emulate_half import Softmax, emulate_half
from illama.graph.reader import add_constant, array, dtype_of, is_constant, load_graph, to_bytes
from illama.graph.writer import save_graph
from illama.hardware import products_saturate, usable_cores


def cpu_session(
    model: Path | bytes, threads: int = 0, profile: Path | None = None, fused: bool = False, folder: Path | None = None
) -> onnxruntime.InferenceSession:
    """Returns a session that computes exactly what the graph specifies.

    On a CPU whose 8-bit products can overflow (:func:`illama.hardware.products_saturate`), weights are made unsigned,
    which prevents it.

    By default, ONNX Runtime rounds the float inputs of layers with 8- or 4-bit weights to 8 bits
    (``session.qdq_matmulnbits_accuracy_level`` 4 in its documentation of session options). Level 1 keeps them in
    float32.

    Args:
        model: path to the file, or its content.
        threads: number of threads within an operator; 0 for one per core.
        profile: prefix of the file that ``end_profiling`` writes.
        fused: whether the graph is one for TensorRT. If so, three optimizations of ONNX Runtime are disabled: one
            rounds a quantized convolution's bias to integers that exceed half precision, one removes a Relu before a
            QuantizeLinear to FP8, and one makes int8 unsigned, which ONNX Runtime then rejects across a Transpose.
        folder: folder of the external data, if ``model`` is the content of a file.
    """
    if isinstance(model, Path):
        check_graph(model)
    exact = products_saturate() and not fused
    if exact:
        folder = model.parent if isinstance(model, Path) else folder
        model = _with_zero_points(model, folder)
    options = onnxruntime.SessionOptions()
    if fused:  # for memory: by default, what numeric_range.py watches would be kept until the end
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    options.intra_op_num_threads, options.log_severity_level = threads or usable_cores(), 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))  # 1: multiplies u8 x u8
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    disabled = ["WeightBiasQuantization", "ReluQuantRewrite", "QDQS8ToU8Transformer"] if fused else None
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def _with_zero_points(source: Path | bytes, folder: Path | None) -> Path | bytes:
    """Returns a graph in which every 8-bit constant has a zero point, which ONNX Runtime needs to make it unsigned.

    A graph without such constants is returned as it was given.
    """
    model = load_graph(source) if isinstance(source, Path) else ir.from_proto(onnx.load_from_string(source))
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    changed = False
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" and len(node.inputs) == 2 else None
        if value is not None and is_constant(value) and dtype_of(value) == ir.DataType.INT8:
            shape = array(node.inputs[1]).shape
            node.resize_inputs(3)
            node.replace_input_with(2, add_constant(model.graph, f"{value.name}.zero", np.zeros(shape, np.int8)))
            changed = True
    return to_bytes(model) if changed else source


def emulated_session(path: Path, threads: int = 0, softmax: Softmax = "float32") -> onnxruntime.InferenceSession:
    """Returns a session of a graph for TensorRT that rounds as half precision does (:func:`emulate_half`)."""
    model = load_graph(path)
    emulate_half(model, softmax)
    return session_of(model, threads)


def session_of(model: ir.Model, threads: int = 0) -> onnxruntime.InferenceSession:
    """Returns a session of a graph for TensorRT in memory, which may be too large for one message."""
    with tempfile.TemporaryDirectory() as folder:  # the session maps the file, which exists until it is unmapped
        save_graph(model, Path(folder) / FUSED_ONNX)
        return cpu_session(Path(folder) / FUSED_ONNX, threads, fused=True)
