"""Patterns of operators: attention in pieces, normalizations, and what is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from illama.graph.reader import array, dtype_of, is_constant, readers, stored

_PRODUCTS = ("MatMul", "Einsum")
# Operators between the two products of an attention, besides the softmax.
_BETWEEN = (
    *("Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Identity", "Dropout", "Clip", "Max", "Expand"),
    *("QuantizeLinear", "DequantizeLinear"),
)
VIEWS = ("Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten")
NORMALIZATIONS = (
    *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
    *("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
)


@dataclass(frozen=True)
class Pieces:
    """An attention that is not one operator: MatMul (scores), Softmax, MatMul (values).

    Attributes:
        before: operators between the first product and the softmax.
    """

    scores: ir.Node
    softmax: ir.Node
    values: ir.Node
    before: tuple[ir.Node, ...]


def attentions_in_pieces(model: ir.Model) -> Iterator[Pieces]:
    """Yields every softmax between two products of computed values."""
    for node in model.graph:
        if node.op_type == "Softmax":
            before: list[ir.Node] = []
            scores, values = _find(node, before, forward=False), _find(node, [], forward=True)
            if scores is not None and values is not None:
                yield Pieces(scores, node, values, tuple(before))


def _find(start: ir.Node, passed: list[ir.Node], forward: bool) -> ir.Node | None:
    """Returns the nearest product of two computed values before or after a node; adds what lies between to a list."""
    queue, seen = [start], {start}
    while queue:
        node = queue.pop(0)
        if forward:
            near = [reader for value in node.outputs for reader in readers(value)]
        else:
            near = [made for value in node.inputs if value is not None and (made := value.producer()) is not None]
        for each in near:
            if each.op_type in _PRODUCTS and not any(map(is_constant, each.inputs)):
                return each
            if each.op_type in _BETWEEN and each not in seen:
                seen.add(each)
                passed.append(each)
                queue.append(each)
    return None


def quantizer_of(value: ir.Value | None) -> ir.Node | None:
    """Returns the DequantizeLinear that an activation comes from, behind views and casts; None if there is none."""
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            return node if source is not None and source.producer() is not None else None
        if node.op_type not in VIEWS:
            return None
        value = node.inputs[0]
    return None


def is_quantized_next(value: ir.Value) -> bool:
    """Whether a result is quantized at once, behind views and casts, by all that read it."""
    nodes = readers(value)
    return bool(nodes) and all(
        node.op_type == "QuantizeLinear" or (node.op_type in VIEWS and is_quantized_next(node.outputs[0]))
        for node in nodes
    )


def format_of(dequantize: ir.Node) -> ir.DataType | None:
    """Returns the number format that a DequantizeLinear reads."""
    value = dequantize.inputs[0]
    return dtype_of(value) if value is not None else None


def is_sum_of_squares(node: ir.Node) -> bool:
    """Whether an operator is the reduction of a normalization in pieces: of squares, over the last axis."""
    if node.op_type in ("ReduceL2", "ReduceSumSquare"):
        return _reduces_last(node)
    if node.op_type not in ("ReduceMean", "ReduceSum") or not _reduces_last(node):
        return False
    made = node.inputs[0].producer() if node.inputs[0] is not None else None
    return made is not None and (_is_square(made))


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Pow":
        return is_constant(node.inputs[1]) and bool((array(node.inputs[1]) == 2).all())
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def _reduces_last(node: ir.Node) -> bool:
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else None
    axes: list[int] = []
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    elif len(node.inputs) > 1 and is_constant(node.inputs[1]):
        axes = array(node.inputs[1]).ravel().tolist()
    return -1 in axes or (rank is not None and rank - 1 in axes)


def weight_of(product: ir.Node) -> ir.Value | None:
    """Returns the constant second operand of a product as it is stored; None if it is computed."""
    if len(product.inputs) < 2 or product.inputs[1] is None:
        return None
    value, dequantize = stored(product.inputs[1])
    if dequantize is not None and not is_constant(value):  # float weights behind a QuantizeLinear
        made = value.producer()
        source = made.inputs[0] if made is not None and made.op_type == "QuantizeLinear" else None
        return source if is_constant(source) else None
    return value if is_constant(value) else None
