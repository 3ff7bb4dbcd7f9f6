"""Adds the preprocessing to a graph: resize and crop as matrix products, and normalization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from PIL import Image

from illama.data.images import resize_weights
from illama.data.preprocessing import Preprocessing
from illama.graph.reader import add_constant

Step = tuple[str, list[str], dict[str, Any]]  # operator, constants, attributes
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R BT.601, in the fractions that Pillow uses


def add_preprocessing(model: ir.Model, preprocessing: Preprocessing, frame: tuple[int, int, int]) -> None:
    """Lets a graph take uint8 frames (B, height, width, channels) instead of the network's input, in place.

        before   images (B, C, S, S) float32 -> ...
        after    images (B, H, W, c) uint8 -> Cast -> Transpose -> MatMul (columns) -> Round -> Clip
                 -> MatMul (rows) -> Round -> Clip [-> Conv (RGB to gray, or back) -> Round] -> Mul -> Add -> ...

    A resize from a fixed size is one matrix product for each axis, and a crop omits rows of the matrix. The result thus
    does not depend on a runtime's implementation of interpolation. The order and the rounding of the passes are
    Pillow's, with which accuracy is measured: pixels differ by at most one level, due to Pillow's fixed-point numbers.

    Args:
        frame: (height, width, channels).
    """
    graph, image = model.graph, model.graph.inputs[0]
    height, width, channels = frame
    rows, columns = _resize_and_crop(height, width, preprocessing)
    mean, std = (
        np.array(values, dtype=np.float32).reshape(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    values = {"columns": columns.T, "rows": rows, "low": np.float32(0), "high": np.float32(255)}
    values |= {"scale": 1 / (255 * std), "shift": -mean / std}
    if channels != preprocessing.in_channels:
        values["colors"] = _color_weights(channels)
    constants = {
        name: add_constant(graph, f"preprocess.{name}", np.asarray(each, dtype=np.float32))
        for name, each in values.items()
    }
    assert image.shape is not None
    batch, old = image.shape[0], image
    image = ir.Value(name=old.name, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([batch, *frame]))
    old.name = "preprocessed"
    steps = _steps(_rows_come_first(rows, columns, preprocessing), "colors" in values)
    nodes, value = [], image
    for index, (kind, extra, attributes) in enumerate(steps):
        inputs = [value, *(constants[name] for name in extra)]
        if kind in ("Columns", "Rows"):  # the matrix of the rows is the left factor
            kind, inputs = "MatMul", inputs[::-1] if kind == "Rows" else inputs
        name = f"preprocess/{kind}_{index}"
        nodes.append(ir.node(kind, inputs, attributes, name=name))
        value = nodes[-1].outputs[0]
        value.name = f"preprocess.{index}"
    value.type, value.shape = old.type, old.shape
    old.replace_all_uses_with(value)
    value.name, graph.inputs[0] = "preprocessed", image
    graph.insert_before(graph[0], nodes)


def _steps(rows_first: bool, convert_colors: bool) -> list[Step]:
    """Returns the operators from frames to the network's input, in order."""
    round_and_clip: list[Step] = [("Round", [], {}), ("Clip", ["low", "high"], {})]
    passes: list[Step] = [("Columns", ["columns"], {}), ("Rows", ["rows"], {})]
    first, second = reversed(passes) if rows_first else passes
    return [
        ("Cast", [], {"to": ir.DataType.FLOAT}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
        first,
        *round_and_clip,
        second,
        *round_and_clip,
        *([("Conv", ["colors"], {}), ("Round", [], {})] if convert_colors else []),
        ("Mul", ["scale"], {}),
        ("Add", ["shift"], {}),
    ]


def _resize_and_crop(height: int, width: int, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Returns the matrices of a resize and crop like torchvision's: for rows (H, height), for columns (W, width)."""
    size, kind = preprocessing.size, preprocessing.interpolation
    axes = preprocessing.crop_in((height, width)) if preprocessing.resize else [(each, 0) for each in size]
    rows, columns = (
        _matrix(resize_weights(old, new, first, count, kind), old)
        for old, (new, first), count in zip((height, width), axes, size, strict=True)
    )
    return rows, columns


def _rows_come_first(rows: np.ndarray, columns: np.ndarray, preprocessing: Preprocessing) -> bool:
    """Whether Pillow resizes the rows first, tested with noise: it depends on the sizes and on Pillow's version."""
    frame = np.random.default_rng(0).integers(0, 256, (rows.shape[1], columns.shape[1]), dtype=np.uint8)
    gray = replace(preprocessing, in_channels=1, mean=(0.0,), std=(1 / 255,))
    expected = gray.to_array(Image.fromarray(frame))[0]

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.round().clip(0, 255)

    orders = rounded(rows @ rounded(frame @ columns.T)), rounded(rounded(rows @ frame) @ columns.T)
    return bool(np.abs(orders[1] - expected).sum() < np.abs(orders[0] - expected).sum())


def _matrix(resize: tuple[int, np.ndarray], old: int) -> np.ndarray:
    """Returns the matrix (n, old) of :func:`illama.data.images.resize_weights` along an axis of ``old`` pixels."""
    low, weights = resize
    matrix = np.zeros((len(weights), old), np.float32)
    matrix[:, low : low + weights.shape[1]] = weights
    return matrix


def _color_weights(channels: int) -> np.ndarray:
    """Returns the weights of a 1x1 convolution from RGB to grayscale, or from grayscale to RGB."""
    weights = np.array(LUMA)[None, :] if channels == 3 else np.ones((3, 1))
    return weights[:, :, None, None].astype(np.float32)
