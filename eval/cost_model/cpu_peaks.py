"""Measured peak rates of this machine's CPU, in the form of the published ones."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
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
        precision: operations / min(timeit.repeat(_square_product(integer), number=1, repeat=rounds)) / 1e12
        for precision, integer in (("fp32", False), ("int8", True))
    }
    return Device(CPU, _copy_rate(rounds) / 1e9, peaks, f"measured here: {describe_machine()['cpu']}")  # type: ignore[arg-type]


def _square_product(integer: bool) -> Callable[[], Any]:
    """Returns a function that computes one square product, of uint8 inputs by int8 weights or in float32."""
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
    inputs = (values + 100).astype(np.uint8 if integer else np.float32)
    return partial(cpu_session(model.SerializeToString()).run, None, {"x": inputs})


def _copy_rate(rounds: int, megabytes: int = 256) -> float:
    """Returns the bytes read and written per second, with each core copying its own part."""
    cores = usable_cores()
    source = np.ones((cores, megabytes * 2**20 // cores), np.uint8)
    target = np.zeros_like(source)
    with ThreadPoolExecutor(cores) as pool:
        times = timeit.repeat(lambda: list(pool.map(np.copyto, target, source)), number=1, repeat=rounds)
    return 2 * source.nbytes / min(times)
