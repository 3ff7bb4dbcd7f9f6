"""How fast a file could be at best on a machine that is not here: python eval/roofline.py runs/ptq/int8

A floor of the latency by the roofline model (Williams et al., CACM 52(4), 2009): a layer takes as long as its
products' operations at the device's peak rates, or as long as their operands and results need to and from memory,
whichever is longer; layers follow one another. It is a PREDICTION from published figures, and an optimist: kernels
reach a part of a peak, launches cost time, and all that is not a product is taken to be free. Only where a network
stays in the cache from call to call can a device be faster than its memory allows here.

With ``--device cpu`` the same model is held against this machine: its peaks are measured, and so is every layer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import tyro
from onnx import TensorProto, helper, numpy_helper

from eval.benchmark.open_bundles import refuse_frames
from eval.cost_model.devices import Device, LacksPrecisionError, find_device
from eval.cost_model.onnx_costs import ProductCost, product_costs
from eval.report.store import write_results
from illama.bundle import CPU_ONNX, FUSED_ONNX, Manifest
from illama.cli import run_command
from illama.errors import UserError
from illama.graph.layer_times import GraphTimes, time_graphs
from illama.graph.session import cpu_session
from illama.hardware import describe_machine
from illama.inference import usable_cores
from illama.markdown_table import markdown

RESULTS = "roofline"
CPU = "cpu"  # this machine
_PROBE = 1024  # side of the matrices that the CPU's peaks are measured with


@dataclass(frozen=True)
class RooflineOptions:
    """Predict a floor of bundles' latency on devices; of one bundle on one device, layer by layer.

    Attributes:
        bundles: of python quant/ptq.py.
        device: such as orin-nano, agx-orin, thor, rtx-4090, l4, h100; cpu is this machine, measured.
        batch: images a call.
        out: folder for the results.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional]
    device: tuple[str, ...] = ("orin-nano",)
    batch: int = 1
    out: Path = Path("runs/roofline")

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"--batch must be at least 1, not {self.batch}")
        if not self.bundles or not self.device:
            raise UserError("name at least one bundle and one --device")
        if len({bundle.name for bundle in self.bundles}) < len(self.bundles):
            raise UserError("two bundles have the same name: predict for them one after the other")


@dataclass(frozen=True)
class LayerFloor:
    """The least time that a layer can take, predicted.

    Attributes:
        precision: that its products run in; several are joined by +.
        milliseconds: the floor.
        bound: what sets it, ``compute`` or ``memory``.
    """

    layer: str
    precision: str
    operations: int
    bytes: float
    milliseconds: float
    bound: str


def predict_floor(costs: Sequence[ProductCost], device: Device) -> list[LayerFloor]:
    """A floor for each layer; their sum is that of the network.

    Raises:
        UserError: the device lacks a precision.
    """
    layers: dict[str, list[ProductCost]] = defaultdict(list)
    for cost in costs:
        layers[cost.layer].append(cost)
    floors = []
    for layer, products in layers.items():
        compute = sum(product.operations / device.peak(product.precision) for product in products)
        size = sum(product.weight_bytes + product.activation_bytes for product in products)
        memory = size / (device.bandwidth * 1e9)
        floors.append(
            LayerFloor(
                layer,
                "+".join(dict.fromkeys(product.precision for product in products)),
                sum(product.operations for product in products),
                size,
                max(compute, memory) * 1e3,
                "compute" if compute > memory else "memory",
            )
        )
    return floors


def measure_cpu(rounds: int = 10) -> Device:
    """This CPU's peaks, by large products in ONNX Runtime in FP32 and INT8, and by copies in memory; the best of each.

    There is no FP8: a CPU can only emulate it.
    """
    operations = 2 * _PROBE**3
    peaks = {
        precision: operations / _best(_product(integer), rounds) / 1e12
        for precision, integer in (("fp32", False), ("int8", True))
    }
    return Device(CPU, _copy_rate(rounds) / 1e9, peaks, f"measured here: {describe_machine()['cpu']}")  # type: ignore[arg-type]


def _product(integer: bool) -> tuple[onnxruntime.InferenceSession, np.ndarray]:
    """A session and its inputs: one square product, of int8 weights by uint8 inputs or of float32."""
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


def _best(probe: tuple[onnxruntime.InferenceSession, np.ndarray], rounds: int) -> float:
    session, values = probe
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        session.run(None, {"x": values})
        times.append(time.perf_counter() - start)
    return min(times)


def _copy_rate(rounds: int, megabytes: int = 256) -> float:
    """Bytes a second read and written, every core copying a part of its own."""
    cores = usable_cores()
    source = np.ones((cores, megabytes * 2**20 // cores), np.uint8)
    target, times = np.zeros_like(source), []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def measure_layers(path: Path, floors: Sequence[LayerFloor], batch: int) -> GraphTimes:
    """What the layers take in ONNX Runtime here: of a whole call, their shares of what the profiler gives all nodes.

    The profiler's own milliseconds are too long, for it slows small nodes: of a small network they add up to more than
    a call without it takes.
    """
    shape = [dim.dim_value or batch for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    times = time_graphs({"file": path}, images, {floor.layer: None for floor in floors})["file"]
    share = times.call / (sum(times.layers.values()) + times.rest)
    return GraphTimes(times.call, {layer: each * share for layer, each in times.layers.items()}, times.rest * share)


def find_file(bundle: Path, on_cpu: bool) -> Path:
    """The graph that the device would run; UserError if the bundle has none, or none that can be timed here."""
    manifest = Manifest.read(bundle)
    if on_cpu:
        refuse_frames(bundle, manifest)
    names = (CPU_ONNX,) if on_cpu else (FUSED_ONNX, CPU_ONNX)
    found = [bundle / name for name in names if (bundle / name).exists()]
    if not found:
        raise UserError(f"{bundle} has no {' or '.join(names)}: quantize it first, with python quant/ptq.py")
    return found[0]


@dataclass(frozen=True)
class Prediction:
    """A file on a device, and what its layers take in fact where the device is this machine; ``bundle`` is its name."""

    bundle: str
    device: str
    floors: list[LayerFloor]
    measured: GraphTimes | None = None

    @property
    def milliseconds(self) -> float:
        """The floor of the whole network."""
        return sum(floor.milliseconds for floor in self.floors)

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "device": self.device,
            "milliseconds": self.milliseconds,
            "floors": {floor.layer: floor.milliseconds for floor in self.floors},
            "measured": vars(self.measured) if self.measured else None,
        }


def predict(bundle: Path, device: Device, batch: int) -> Prediction:
    """UserError if the bundle has no file for the device, or the device lacks a precision."""
    on_cpu = device.name == CPU
    path = find_file(bundle, on_cpu)
    floors = predict_floor(product_costs(path, batch), device)
    return Prediction(bundle.name, device.name, floors, measure_layers(path, floors, batch) if on_cpu else None)


def layer_table(prediction: Prediction) -> str:
    """A line for each layer; with what was measured and by how much the prediction misses it."""
    measured = prediction.measured
    rows = []
    for floor in prediction.floors:
        row = (
            floor.layer,
            floor.precision,
            f"{floor.operations / 1e6:.2f}",
            f"{floor.bytes / 1e3:.1f}",
            floor.bound,
            f"{floor.milliseconds:.4f}",
        )
        rows.append((*row, *_against(floor.milliseconds, measured.layers.get(floor.layer))) if measured else row)
    more = ("measured ms", "error") if measured else ()
    return markdown(("layer", "in", "MFLOP", "kB", "bound", "predicted ms", *more), rows)


def device_table(predictions: Sequence[Prediction], bundles: Sequence[str], devices: Sequence[str]) -> str:
    """A line for each device, a column for each bundle; a dash where the device lacks a precision."""
    times = {(each.device, each.bundle): f"{each.milliseconds:.3f}" for each in predictions}
    rows = [(device, *(times.get((device, bundle), "-") for bundle in bundles)) for device in devices]
    return markdown(("device", *(f"{bundle} ms, predicted" for bundle in bundles)), rows)


def measured_table(predictions: Sequence[Prediction]) -> str:
    """A line for each bundle that was measured here: its products, and a whole call."""
    headings = (
        "bundle",
        "products, predicted ms",
        "products, measured ms",
        "error",
        "a whole call, measured ms",
        "error",
    )
    return markdown(
        headings,
        [
            (
                each.bundle,
                f"{each.milliseconds:.2f}",
                *_against(each.milliseconds, sum(each.measured.layers.values()), 2),
                *_against(each.milliseconds, each.measured.call, 2),
            )
            for each in predictions
            if each.measured
        ],
    )


def _against(predicted: float, measured: float | None, digits: int = 4) -> tuple[str, str]:
    if not measured:
        return "-", "-"
    return f"{measured:.{digits}f}", f"{(predicted / measured - 1) * 100:+.0f}%"


def report(predictions: Sequence[Prediction], bundles: Sequence[str], devices: Sequence[Device], batch: int) -> str:
    """The tables, after the peaks that they come from."""
    lines = [f"PREDICTED, not measured: the least that a call can take, batch {batch}", ""]
    for device in devices:
        peaks = ", ".join(f"{name} {value:.4g}" for name, value in device.peaks.items())
        lines.append(f"- {device.name}: {peaks} x 10^12 operations/s, {device.bandwidth:.4g} GB/s ({device.source})")
    tables = [layer_table(predictions[0])] if len(predictions) == 1 else []
    if elsewhere := [device.name for device in devices if device.name != CPU]:
        tables.append(device_table(predictions, bundles, elsewhere))
    if any(each.measured for each in predictions):
        tables.append(measured_table(predictions))
    return "\n\n".join(["\n".join(lines), *tables])


def main(options: RooflineOptions) -> None:
    for bundle in options.bundles:  # before anything is measured
        find_file(bundle, CPU in options.device)
    devices = [measure_cpu() if name == CPU else find_device(name) for name in dict.fromkeys(options.device)]
    predictions, refused = [], None
    for device in devices:
        for bundle in options.bundles:
            try:
                predictions.append(predict(bundle, device, options.batch))
            except LacksPrecisionError as error:  # a dash in the table
                refused = error
    if refused and not predictions:
        raise refused
    names = [bundle.name for bundle in options.bundles]
    facts = {
        "batch": options.batch,
        "devices": [asdict(each) for each in devices],
        "predictions": [each.to_json() for each in predictions],
    }
    write_results(options.out, RESULTS, facts, report(predictions, names, devices, options.batch))


if __name__ == "__main__":
    run_command(RooflineOptions, main)
