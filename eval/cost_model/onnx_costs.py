"""Cost of the products of an ONNX graph: operations, bytes, and the precision they run in.

Only products are counted: matrix products, convolutions and attention. A good runtime fuses everything else (norms,
activations, quantization, copies) into them or overlaps it with them, so the cost without it is a lower bound.
:func:`illama.graph.reader.products` says what a product runs in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from illama.errors import UserError
from illama.graph.reader import PRODUCTS, Precision, infer_shapes, is_constant, load_graph, products, stored

_INTEGER = ("MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv")
_UNCOUNTED = (*_INTEGER, "ConvTranspose", "Einsum", "RNN", "LSTM", "GRU", "DeformConv")


@dataclass(frozen=True)
class ProductCost:
    """Cost of one product of a graph.

    Attributes:
        layer: name of the layer in the network; a layer may have several products.
        operations: number of operations, two per multiply-accumulate.
        weight_bytes: size of the constant operands as they are stored, with their scales.
        activation_bytes: size of the other operands and of the result.
    """

    layer: str
    operator: str
    precision: Precision
    operations: int
    weight_bytes: float
    activation_bytes: float


def product_costs(path: Path, batch: int = 1) -> list[ProductCost]:
    """Returns the products of an ONNX file, for ``batch`` images, in the order of the graph.

    Raises:
        UserError: it is not an ONNX file, its shapes cannot be inferred, or it has an operator that cannot be counted.
    """
    model = load_graph(path)
    infer_shapes(model, batch)
    _check(path, model)
    costs = []
    for each in products(model):
        node, result = each.node, each.node.outputs[0]
        if each.name == "Attention q k":  # the probabilities between the two products stay on the chip
            operations = 2 * _elements(node.inputs[0]) * _shape(node.inputs[1])[-2]
            operands, results = [*node.inputs[:2], *node.inputs[3:]], []
        elif each.name == "Attention p v":
            operations = 2 * _elements(result) * _shape(node.inputs[1])[-2]
            operands, results = [node.inputs[2]], [result]
        else:
            operations = 2 * _elements(result) * _terms(node)
            operands, results = [*node.inputs], [result]
        costs.append(ProductCost(each.layer, each.name, each.precision, operations, *_bytes(operands, results)))
    return costs


def _check(path: Path, model: ir.Model) -> None:
    """Raises UserError unless each operator can be counted and the shapes of its operands are known."""
    for node in model.graph:
        if node.op_type in _UNCOUNTED:
            raise UserError(
                f"{path} has the operator {node.op_type}, which cannot be counted: give a file of this project"
            )
        for value in (*node.inputs, *node.outputs) if node.op_type in PRODUCTS else ():
            if value is not None and (value.dtype is None or value.shape is None or not value.shape.is_static()):
                raise UserError(f"the shape of {value.name} cannot be inferred: export the network at one image size")


def _terms(node: ir.Node) -> int:
    """Returns the number of products that each output element of a MatMul, Gemm or Conv is the sum of."""
    if node.op_type == "Conv":
        return math.prod(_shape(node.inputs[1])[1:])
    return _shape(node.inputs[0])[-2 if node.attributes.get_int("transA", 0) else -1]


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.shape is not None
    return value.shape.numpy()


def _elements(value: ir.Value | None) -> int:
    return math.prod(_shape(value))


def _size(value: ir.Value) -> float:
    """Returns the bytes of a value; two 4-bit integers share a byte."""
    return _elements(value) * (value.dtype or ir.DataType.FLOAT).bitwidth / 8


def _bytes(inputs: Iterable[ir.Value | None], outputs: Sequence[ir.Value]) -> tuple[float, float]:
    """Returns the bytes of constant operands and of all other values; a value that occurs twice is read once."""
    weights, activations = 0.0, sum(_size(value) for value in outputs)
    for operand in dict.fromkeys(value for value in inputs if value is not None):
        value, dequantize = stored(operand)
        if is_constant(value):
            weights += _size(value) + _scale_bytes(dequantize)
        else:
            activations += _size(value)
    return weights, activations


def _scale_bytes(dequantize: ir.Node | None) -> float:
    """Returns the bytes of the constant scales and zero points of a weight; block scales can have a scale too."""
    size = 0.0
    for each in dequantize.inputs[1:] if dequantize is not None else ():
        value, inner = stored(each) if each is not None else (None, None)
        if value is not None and is_constant(value):
            size += _size(value) + _scale_bytes(inner)
    return size
