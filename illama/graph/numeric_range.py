"""How much of the range of half precision a network uses, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import onnxruntime

from illama.bundle import INPUT
from illama.graph.emulate_half import HALF, emulate_half
from illama.graph.reader import PRODUCTS, array, layer_of, load_graph
from illama.graph.session import session_of
from illama.manifest import HalfDtype, LayerRange
from illama.progress import track


def measure_ranges(path: Path, batches: Iterable[np.ndarray]) -> tuple[LayerRange, ...]:
    """Returns the range of each layer in half precision of a graph for TensorRT.

    The results are computed in float32, so that one that overflows does not hide those after it.

    Args:
        batches: images (B, C, H, W) float32, the same number in each batch or fewer.
    """
    weights, watched, session = _open_watched(path)
    names = [name for _, _, added in watched for name in added]
    tracked = track(batches, "check half precision", "batch")
    found = _finite(np.max([session.run(names, {INPUT: images}) for images in tracked], axis=0))
    values, largest = dict(zip(names, found.tolist(), strict=True)), dict[str, float]()
    for layer, _, added in watched:
        largest[layer] = max([largest.get(layer, 0.0), *(values[name] for name in added)])
    dtypes = {layer: cast("HalfDtype", dtype.name.lower()) for layer, dtype, _ in watched}
    return tuple(LayerRange(layer, dtypes[layer], value, weights.get(layer)) for layer, value in largest.items())


def _open_watched(
    path: Path,
) -> tuple[dict[str, float], list[tuple[str, ir.DataType, list[str]]], onnxruntime.InferenceSession]:
    """Returns each layer's largest weight; layer, dtype and outputs of each watched node; and a session.

    The graph is freed, because its weights take as much memory as the session.
    """
    model = load_graph(path)
    weights = _largest_weights(model)
    computed = emulate_half(model, softmax="half", rounding=False)
    model.graph.outputs.clear()
    watched = [(layer_of(node), dtype, _watch(model.graph, node)) for node, dtype in computed]
    return weights, watched, session_of(model)


def _largest_weights(model: ir.Model) -> dict[str, float]:
    """Returns the largest magnitude of the constants in half precision that each layer multiplies by."""
    found: dict[str, float] = {}
    for node in (node for node in model.graph if node.op_type in PRODUCTS):
        for value in node.inputs[1:2]:
            if value is not None and value.const_value is not None and value.dtype in HALF:
                layer, largest = layer_of(node), float(_finite(np.abs(array(value).astype(np.float32)).max(initial=0)))
                found[layer] = max(largest, found.get(layer, 0.0))
    return found


def _finite(values: np.ndarray) -> np.ndarray:
    """Replaces what is not finite by float32's largest number, which JSON can hold."""
    largest = float(np.finfo(np.float32).max)
    return np.nan_to_num(values, nan=largest, posinf=largest)


def _watch(graph: ir.Graph, node: ir.Node) -> list[str]:
    """Adds the largest magnitude of each result of a node as an output of the graph; returns the outputs' names."""
    names = []
    for value in node.outputs:
        magnitude = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0})
        for each in (magnitude, largest):
            each.outputs[0].name = each.name = f"{value.name}/{each.op_type}"
            each.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        largest.outputs[0].shape = ir.Shape([])
        graph.insert_after(node, [magnitude, largest])
        graph.outputs.append(largest.outputs[0])
        names.append(str(largest.outputs[0].name))
    return names
