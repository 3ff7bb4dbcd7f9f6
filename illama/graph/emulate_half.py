"""Graphs in half precision, rewritten so that a CPU computes them as a GPU does.

ONNX Runtime has no half precision on CPUs. It computes such a graph in float32 and rounds nothing in between, so that a
network that overflows in float16 seems to lose no accuracy. The rewritten graph is in float32, and rounds the result of
every operator to the dtype that it has in the original graph. The sums inside a product, and the quotient inside a
QuantizeLinear, are in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from illama.errors import UserError
from illama.graph.reader import SoftmaxOutput, add_constant, layer_of, read_softmax_scales

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
    outputs = read_softmax_scales(model)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        _decompose(model.graph, node, softmax, outputs.get(layer_of(node)))
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


def _decompose(graph: ir.Graph, attention: ir.Node, softmax: Softmax, output: SoftmaxOutput | None) -> None:
    """Replaces an Attention by its parts.

        before   Attention(q, k, v, mask)
        after    MatMul(q, Transpose(k)) -> Mul(scale) -> mask -> Softmax [-> Q/DQ] -> MatMul(v)

    The parts have the dtype in which their results are rounded: the scores are in float32 if the softmax is.
    """
    options = {name: attribute.value for name, attribute in attention.attributes.items()}
    q, k, v, mask = [*attention.inputs, None][:4]
    result = attention.outputs[0]
    half = result.dtype
    assert q is not None and k is not None and q.shape is not None and k.shape is not None and half is not None
    if options.get("is_causal") or options.get("softcap") or len(q.shape) != 4 or k.shape[1] != q.shape[1]:
        raise UserError(f"{layer_of(attention)} is an attention that cannot be emulated in half precision")
    scores = half if softmax == "half" else _FLOAT
    added: list[ir.Node] = []

    def add(kind: str, inputs: list[ir.Value | None], dtype: ir.DataType, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        name = f"{attention.name}/{len(added)}.{kind}"
        node.name, node.outputs[0].name, node.outputs[0].type = name, name, ir.TensorType(dtype)
        node.metadata_props.update(attention.metadata_props)
        added.append(node)
        return node.outputs[0]

    def constant(name: str, number: object, dtype: ir.DataType) -> ir.Value:
        return add_constant(graph, f"{attention.name}/{name}", np.array(number, dtype.numpy()))

    x = add("MatMul", [q, add("Transpose", [k], half, perm=(0, 1, 3, 2))], scores)
    scale = options.get("scale", float(str(q.shape[3])) ** -0.5)
    if scale != 1:
        x = add("Mul", [x, constant("scale", scale, scores)], scores)
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        x = add("Where", [mask, x, constant("masked", -np.inf, scores)], scores)
    elif mask is not None:
        x = add("Add", [x, mask], scores)
    x = add("Softmax", [x], half, axis=-1)
    if output is not None:
        steps = [constant("output_scale", output.scale, half), constant(f"zero_{output.number}", 0, output.dtype)]
        x = add("DequantizeLinear", [add("QuantizeLinear", [x, *steps], output.dtype), *steps], half)
    x = add("MatMul", [x, v], half)
    x.shape = result.shape
    graph.insert_before(attention, added)
    result.replace_all_uses_with(x, replace_graph_outputs=True)
    graph.remove(attention, safe=True)
