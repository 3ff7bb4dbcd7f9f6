"""Lower bound of the latency of an ONNX file on a device, by the roofline model (Williams et al., CACM 52(4), 2009).

A layer takes the longer of two times: its products' operations at the device's peak rates, and the transfer of their
operands and results from and to memory. Layers run one after another. The bound is a PREDICTION from published figures,
and an optimistic one: kernels reach only part of a peak, launches take time, and everything that is not a product is
assumed to be free. A device can be faster only if a network stays in the cache between calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.cost_model.devices import CPU, Device
from eval.cost_model.onnx_costs import ProductCost, product_costs
from eval.measure.open_bundles import refuse_frames
from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.errors import UserError
from illama.graph.layer_times import GraphTimes, layer_of_module, time_graphs
from illama.graph.reader import infer_shapes, load_graph
from illama.manifest import Manifest
from illama.markdown_table import markdown


@dataclass(frozen=True)
class LayerBound:
    """Predicted lower bound of the time of a layer.

    Attributes:
        precision: precision of the layer's products; several are joined by +.
        bytes: size of the operands and results of its products.
        milliseconds: the lower bound.
        limited_by: what the bound comes from, ``compute`` or ``memory``.
    """

    layer: str
    precision: str
    operations: int
    bytes: float
    milliseconds: float
    limited_by: str


def lower_bounds(costs: Sequence[ProductCost], device: Device) -> list[LayerBound]:
    """Returns a lower bound for each layer; that of the network is their sum.

    Raises:
        LacksPrecisionError: the device lacks a precision.
    """
    layers: dict[str, list[ProductCost]] = defaultdict(list)
    for cost in costs:
        layers[cost.layer].append(cost)
    bounds = []
    for layer, products in layers.items():
        compute = sum(product.operations / device.peak(product.precision) for product in products)
        size = sum(product.weight_bytes + product.activation_bytes for product in products)
        memory = size / (device.bandwidth * 1e9)
        precision = "+".join(dict.fromkeys(product.precision for product in products))
        operations = sum(product.operations for product in products)
        limited_by = "compute" if compute > memory else "memory"
        bounds.append(LayerBound(layer, precision, operations, size, max(compute, memory) * 1e3, limited_by))
    return bounds


def measure_layers(path: Path, bounds: Sequence[LayerBound], batch: int) -> GraphTimes:
    """Measures the times of the layers in ONNX Runtime on this machine: their shares of a whole call's time.

    The shares come from the profiler, whose times in milliseconds are too long: it slows small nodes down, and for a
    small network the nodes add up to more than a call takes without it.
    """
    model = load_graph(path)
    infer_shapes(model, batch)
    shape = model.graph.inputs[0].shape.numpy()  # type: ignore[union-attr]
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    times = time_graphs({"file": path}, images, {bound.layer: None for bound in bounds})["file"]
    share = times.call / (sum(times.layers.values()) + times.rest)
    return GraphTimes(times.call, {layer: each * share for layer, each in times.layers.items()}, times.rest * share)


def predict_layers(path: Path, device: Device, layers: Collection[str], batch: int = 1) -> GraphTimes:
    """Returns the lower bounds of the layers of a network's file; each product of attention is a layer of its own.

    Raises:
        LacksPrecisionError: the device lacks a precision.
    """
    products = {"Attention q k": ".qk", "Attention p v": ".pv"}
    costs = [replace(cost, layer=cost.layer + products.get(cost.operator, "")) for cost in product_costs(path, batch)]
    times = GraphTimes(0.0)
    for bound in lower_bounds(costs, device):
        times.add(layer_of_module(bound.layer, layers), bound.milliseconds)
        times.call += bound.milliseconds
    return times


def find_file(bundle: Path, on_cpu: bool) -> Path:
    """Returns the ONNX file of a bundle that the device would run.

    Raises:
        UserError: the bundle has none, or takes camera frames and cannot be timed on this machine.
    """
    manifest = Manifest.read(bundle)
    if on_cpu:
        refuse_frames(bundle, manifest)
    names = (CPU_ONNX,) if on_cpu else (FUSED_ONNX, CPU_ONNX)
    found = [bundle / name for name in names if (bundle / name).exists()]
    if not found:
        raise UserError(f"{bundle} has no {' or '.join(names)}: run python quant/ptq.py first")
    return found[0]


@dataclass(frozen=True)
class Prediction:
    """Prediction for a file on a device.

    Attributes:
        bundle: name of the file's bundle.
        measured: measured times of the layers, if the device is this machine; None otherwise.
    """

    bundle: str
    device: str
    bounds: list[LayerBound]
    measured: GraphTimes | None = None

    @property
    def milliseconds(self) -> float:
        """Lower bound of the whole network."""
        return sum(bound.milliseconds for bound in self.bounds)

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "device": self.device,
            "milliseconds": self.milliseconds,
            "floors": {bound.layer: bound.milliseconds for bound in self.bounds},
            "measured": vars(self.measured) if self.measured else None,
        }


def predict(bundle: Path, device: Device, batch: int) -> Prediction:
    """Returns the prediction for a bundle on a device; on this machine with measured times.

    Raises:
        UserError: the bundle has no file for the device.
        LacksPrecisionError: the device lacks a precision.
    """
    on_cpu = device.name == CPU
    path = find_file(bundle, on_cpu)
    bounds = lower_bounds(product_costs(path, batch), device)
    return Prediction(bundle.name, device.name, bounds, measure_layers(path, bounds, batch) if on_cpu else None)


def layer_table(prediction: Prediction) -> str:
    """Returns a row for each layer, with the measured time and the error of the prediction if it was measured."""
    measured = prediction.measured
    rows = []
    for bound in prediction.bounds:
        row = (
            bound.layer,
            bound.precision,
            f"{bound.operations / 1e6:.2f}",
            f"{bound.bytes / 1e3:.1f}",
            bound.limited_by,
            f"{bound.milliseconds:.4f}",
        )
        rows.append((*row, *_compared(bound.milliseconds, measured.layers.get(bound.layer))) if measured else row)
    more = ("measured ms", "error") if measured else ()
    return markdown(("layer", "in", "MFLOP", "kB", "bound", "predicted ms", *more), rows)


def device_table(predictions: Sequence[Prediction], bundles: Sequence[str], devices: Sequence[str]) -> str:
    """Returns a row for each device, a column for each bundle; a dash where the device lacks a precision."""
    times = {(each.device, each.bundle): f"{each.milliseconds:.3f}" for each in predictions}
    rows = [(device, *(times.get((device, bundle), "-") for bundle in bundles)) for device in devices]
    return markdown(("device", *(f"{bundle} ms, predicted" for bundle in bundles)), rows)


def measured_table(predictions: Sequence[Prediction]) -> str:
    """Returns a row for each bundle that was measured on this machine: its products, and a whole call."""
    heads = ("bundle", "products, predicted ms", "products, measured ms", "error", "a whole call, measured ms", "error")
    return markdown(
        heads,
        [
            (
                each.bundle,
                f"{each.milliseconds:.2f}",
                *_compared(each.milliseconds, sum(each.measured.layers.values()), 2),
                *_compared(each.milliseconds, each.measured.call, 2),
            )
            for each in predictions
            if each.measured
        ],
    )


def _compared(predicted: float, measured: float | None, digits: int = 4) -> tuple[str, str]:
    if not measured:
        return "-", "-"
    return f"{measured:.{digits}f}", f"{(predicted / measured - 1) * 100:+.0f}%"


def roofline_tables(
    predictions: Sequence[Prediction], bundles: Sequence[str], devices: Sequence[Device], batch: int
) -> str:
    """Returns the tables of all predictions, after a list of the devices' peak rates."""
    lines = [f"PREDICTED, not measured: lower bound of the latency of one call, batch {batch}", ""]
    for device in devices:
        peaks = ", ".join(f"{name} {value:.4g}" for name, value in device.peaks.items())
        lines.append(f"- {device.name}: {peaks} x 10^12 operations/s, {device.bandwidth:.4g} GB/s ({device.source})")
    tables = [layer_table(predictions[0])] if len(predictions) == 1 else []
    if elsewhere := [device.name for device in devices if device.name != CPU]:
        tables.append(device_table(predictions, bundles, elsewhere))
    if any(each.measured for each in predictions):
        tables.append(measured_table(predictions))
    return "\n\n".join(["\n".join(lines), *tables])
