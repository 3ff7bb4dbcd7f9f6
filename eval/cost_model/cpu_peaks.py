"""Measured peak rates of this machine's CPU, in the form of the published ones."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from eval.cost_model.devices import CPU, Device
from illama.graph.session import cpu_session
from illama.hardware import describe_machine, usable_cores

_PROBE = 1024  # side of the square matrices that are multiplied


def measure_cpu(rounds: int = 10) -> Device:
    """Measures the peak rates of this CPU: the best of ``rounds`` large matrix products, and of copies in memory.

    The products run in ONNX Runtime in FP32 and INT8. FP8 is left out, since a CPU can only emulate it.
    """
    operations = 2 * _PROBE**3
    peaks = {
        precision: operations / _best_time(_square_product(integer), rounds) / 1e12
        for precision, integer in (("fp32", False), ("int8", True))
    }
    return Device(CPU, _copy_rate(rounds) / 1e9, peaks, f"measured here: {describe_machine()['cpu']}")  # type: ignore[arg-type]


def _square_product(integer: bool) -> tuple[onnxruntime.InferenceSession, np.ndarray]:
    """Returns a session of one square product, of uint8 inputs by int8 weights or in float32, and its inputs."""
    values = np.random.default_rng(0).integers(-100, 100, (_PROBE, _PROBE))
    nodes, operands = [], ["x", "w"]
    constants: dict[str, Any] = {"w": values.astype(np.int8 if integer else np.float32)}
    if integer:
        constants |= {"scale": np.float32(0.01), "x_zero": np.uint8(128), "w_zero": np.int8(0)}
        operands = ["x_float", "w_float"]
        nodes = [
            helper.make_node("DequantizeLinear", [name, "scale", f"{name}_zero"], [f"{name}_float"])
            for name in ("x", "w")
        ]
    nodes.append(helper.make_node("MatMul", operands, ["y"]))
    shape, kind = [_PROBE, _PROBE], TensorProto.UINT8 if integer else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return cpu_session(model.SerializeToString()), (values + 100).astype(np.uint8 if integer else np.float32)


def _best_time(probe: tuple[onnxruntime.InferenceSession, np.ndarray], rounds: int) -> float:
    session, values = probe
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        session.run(None, {"x": values})
        times.append(time.perf_counter() - start)
    return min(times)


def _copy_rate(rounds: int, megabytes: int = 256) -> float:
    """Returns the bytes read and written per second, with each core copying its own part."""
    cores = usable_cores()
    source = np.ones((cores, megabytes * 2**20 // cores), np.uint8)
    target, times = np.zeros_like(source), []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)
