"""Graphs in half precision, rewritten so that a CPU computes them as a GPU does.

ONNX Runtime has no half precision on CPUs. It computes such a graph in float32 and rounds nothing in between, so that a
network that overflows in float16 seems to lose no accuracy. The rewritten graph is in float32, and rounds the result of
every operator to the dtype that it has in the original graph. The sums inside a product, and the quotient inside a
QuantizeLinear, are in float32.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from illama.graph.block_scales import expand_block_scales
from illama.graph.decompose_attention import decompose_attention
from illama.graph.reader import layer_of, read_softmax_scales

Softmax = Literal["float32", "half"]
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT = ir.DataType.FLOAT
# Operators whose results need no rounding if their inputs are rounded.
_EXACT = (
    *("Abs", "Clip", "Concat", "Expand", "Flatten", "Gather", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad"),
    *("Relu", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
)


def half_dtypes(model: ir.Model) -> tuple[str, ...]:
    """Returns the names of the half-precision dtypes of a graph's values."""
    found = {value.dtype for node in model.graph for value in node.outputs}
    return tuple(dtype.name.lower() for dtype in HALF if dtype in found)


def emulate_half(
    model: ir.Model, softmax: Softmax = "float32", rounding: bool = True
) -> list[tuple[ir.Node, ir.DataType]]:
    """Replaces half precision by float32 with rounding, in place.

        before   x, w in float16 -> MatMul -> y in float16
        after    x, w in float32 -> MatMul -> Cast to float16 -> Cast to float32 -> y

    Args:
        softmax: precision of the scores and of the softmax inside an Attention operator. A fused kernel may use either;
            its operands, the softmax output among them, are in half precision.
        rounding: if False, results are not rounded, which shows their true range.

    Returns:
        The operators whose results are in half precision, and their dtype, in the order of the graph.

    Raises:
        UserError: an attention has an option that is not emulated.
    """
    expand_block_scales(model)
    outputs = read_softmax_scales(model)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        scores = None if softmax == "half" else _FLOAT
        decompose_attention(model.graph, node, outputs.get(layer_of(node)), scores)
    for value in model.graph.initializers.values():
        if value.dtype in HALF:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = _FLOAT
    computed = [(node, dtype) for node in list(model.graph) if (dtype := _convert(model.graph, node, rounding))]
    RemoveUnusedNodesPass()(model)
    return [(node, dtype) for node, dtype in computed if node.graph is not None]


def _convert(graph: ir.Graph, node: ir.Node, rounding: bool) -> ir.DataType | None:
    """Converts the results of a node to float32; returns the dtype to which they must be rounded, if any."""
    halves = [value for value in node.outputs if value.dtype in HALF]
    if node.op_type == "Cast" and (halves or node.inputs[0].dtype == _FLOAT == node.outputs[0].dtype):  # type: ignore[union-attr]
        node.op_type = "Identity"
        node.attributes.clear()
    elif node.op_type == "ConstantOfShape" and halves:
        zeros = node.attributes["value"].as_tensor().numpy().astype(np.float32)
        node.attributes.add(ir.AttrTensor("value", ir.tensor(zeros)))
    dtype = halves[0].dtype if halves and (node.op_type not in _EXACT or node.op_type == "Identity") else None
    for value in halves:
        if rounding and dtype:
            _round(graph, node, value)
        value.dtype = _FLOAT
    return dtype


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Lets all readers of a value read it rounded to its dtype."""
    assert value.dtype is not None
    narrow = ir.node("Cast", [None], {"to": value.dtype})
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": _FLOAT})
    narrow.outputs[0].name, wide.outputs[0].name = f"{value.name}.narrow", f"{value.name}.rounded"
    wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(_FLOAT), value.shape
    value.replace_all_uses_with(wide.outputs[0], replace_graph_outputs=True)
    narrow.replace_input_with(0, value)
    graph.insert_after(node, [narrow, wide])
