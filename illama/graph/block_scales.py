"""Formats with block scales in graphs: TensorRT's operators, and the same values in standard operators.

Graphs for TensorRT quantize activations at run time by its own operators (:mod:`illama.graph.tensorrt_operators`). CPU
runtimes have none of them, and no kernel for float4e2m1. :func:`expand_block_scales` replaces both.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from illama.errors import UserError
from illama.graph.reader import add_constant, array, is_constant, layer_of, producer
from illama.graph.replacement import Replacement
from illama.graph.tensorrt_operators import DOMAIN, FP4_QUANTIZE, MXFP8_DEQUANTIZE, MXFP8_QUANTIZE

_E8M0_OPSET = 24  # the first with a Cast to powers of two
_FLOAT, _E4M3, _E2M1 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_SMALLEST_SCALE = 2.0**-9  # of float8e4m3fn


def expand_block_scales(model: ir.Model) -> None:
    """Replaces operators and dtypes that CPU runtimes lack by standard ones with the same values, in place.

        before   x -> TRT_FP4DynamicQuantize -> DequantizeLinear -> y;       float4e2m1 weight -> DequantizeLinear -> w
        after    x -> blocks, their scales, rounded to 0.5, 1 or 2 -> y;     2 * weight in int8 -> DequantizeLinear -> w

    Twice a value of float4e2m1 is an integer, so that half the scale gives the same weight. MXFP8's activations need
    opset 24, whose Cast rounds up to a power of two.

    Raises:
        UserError: blocks are not of the last dimension, or a scale that must be a constant is computed.
    """
    graph = model.graph
    for node in list(graph):
        mxfp8 = node.op_type == MXFP8_DEQUANTIZE
        values = node.inputs[0] if mxfp8 or node.op_type == "DequantizeLinear" else None
        if values is None:
            continue
        source = producer(values, MXFP8_QUANTIZE if mxfp8 else FP4_QUANTIZE)
        if mxfp8 and is_constant(values):
            _expand_mxfp8_weight(graph, node)
        elif is_constant(values) and values.dtype == _E2M1:
            _expand_fp4_weight(graph, node)
        elif source is not None and values is source.outputs[0]:
            _expand_activation(graph, node, source)
            if mxfp8:
                model.opset_imports[""] = max(_E8M0_OPSET, model.opset_imports[""])
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)


def _expand_fp4_weight(graph: ir.Graph, node: ir.Node) -> None:
    values, inner = node.inputs[0], producer(node.inputs[1], "DequantizeLinear")
    if values is None or inner is None or not all(map(is_constant, inner.inputs)):
        raise UserError(f"{layer_of(node)} has NVFP4 weights without block scales and a tensor's scale in the file")
    scale = array(inner.inputs[0]).astype(np.float32) * array(inner.inputs[1])
    doubled = (2 * array(values).astype(np.float32)).astype(np.int8)
    node.replace_input_with(0, add_constant(graph, f"{values.name}.doubled", doubled))
    node.replace_input_with(1, add_constant(graph, f"{values.name}.half_scale", scale / 2))


def _expand_mxfp8_weight(graph: ir.Graph, node: ir.Node) -> None:
    values, result, options = node.inputs[0], node.outputs[0], node.attributes
    if not is_constant(node.inputs[1]):
        raise UserError(f"{layer_of(node)} has MXFP8 weights whose scales are not in the file")
    scale = np.exp2(array(node.inputs[1]).astype(np.float32) - 127)
    parts = Replacement(graph, node)
    inputs = [values, parts.constant("scale", scale, _FLOAT)]
    axis, block = options.get_int("axis", -1), options.get_int("block_size", 32)
    weight = parts.add("DequantizeLinear", inputs, _FLOAT, axis=axis, block_size=block)
    parts.finish(_cast(parts, weight, result.dtype))


def _expand_activation(graph: ir.Graph, node: ir.Node, source: ir.Node) -> None:
    x, result, mxfp8 = source.inputs[0], node.outputs[0], source.op_type == MXFP8_QUANTIZE
    assert x is not None and x.shape is not None and x.dtype is not None
    block, axis = source.attributes.get_int("block_size", 32 if mxfp8 else 16), source.attributes.get_int("axis", -1)
    width, constant = x.shape[-1], mxfp8 or is_constant(source.inputs[1])
    if axis not in (-1, len(x.shape) - 1) or not isinstance(width, int) or width % block or not constant:
        raise UserError(
            f"{layer_of(node)} has blocks that do not divide the last dimension, or a computed tensor scale"
        )
    parts, leading = Replacement(graph, node), [0] * (len(x.shape) - 1)
    blocks = parts.constant("blocks", [*leading, width // block, block], ir.DataType.INT64)
    y = parts.add("Reshape", [_cast(parts, x, _FLOAT), blocks])
    last = parts.constant("last", [-1], ir.DataType.INT64)
    largest = parts.add("ReduceMax", [parts.add("Abs", [y]), last], keepdims=1)
    y = _round_mxfp8(parts, y, largest) if mxfp8 else _round_fp4(parts, y, largest, array(source.inputs[1]))
    y = parts.add("Reshape", [y, parts.constant("shape", [*leading, width], ir.DataType.INT64)])
    parts.finish(_cast(parts, y, result.dtype))


def _round_mxfp8(parts: Replacement, x: ir.Value, largest: ir.Value) -> ir.Value:
    limit = parts.constant("limit", _E4M3_MAX, _FLOAT)
    scale = parts.add("Div", [largest, limit])
    scale = parts.add("Cast", [scale], ir.DataType.FLOAT8E8M0, to=ir.DataType.FLOAT8E8M0, round_mode="up")
    scale = _cast(parts, scale, _FLOAT)
    y = parts.add("Clip", [parts.add("Div", [x, scale]), parts.constant("low", -_E4M3_MAX, _FLOAT), limit])
    return parts.add("Mul", [_cast(parts, _cast(parts, y, _E4M3), _FLOAT), scale])


def _round_fp4(parts: Replacement, x: ir.Value, largest: ir.Value, tensor_scale: np.ndarray) -> ir.Value:
    def constant(name: str, number: object) -> ir.Value:
        return parts.constant(name, number, _FLOAT)

    limit = constant("limit", _E2M1_MAX)
    scale = parts.add("Div", [largest, constant("largest_scale", np.float32(_E2M1_MAX) * tensor_scale)])
    scale = parts.add("Clip", [scale, constant("smallest", _SMALLEST_SCALE), constant("largest", _E4M3_MAX)])
    scale = _cast(parts, _cast(parts, scale, _E4M3), _FLOAT)
    scale = parts.add("Mul", [scale, constant("tensor_scale", tensor_scale)])
    y = parts.add("Clip", [parts.add("Div", [x, scale]), constant("low", -_E2M1_MAX), limit])
    size = parts.add("Abs", [y])
    step = parts.add("Where", [_less(parts, size, 4.0), constant("1", 1.0), constant("2", 2.0)], _FLOAT)
    step = parts.add("Where", [_less(parts, size, 2.0), constant("0.5", 0.5), step], _FLOAT)
    y = parts.add("Mul", [parts.add("Round", [parts.add("Div", [y, step])]), step])
    return parts.add("Mul", [y, scale])


def _less(parts: Replacement, x: ir.Value, limit: float) -> ir.Value:
    return parts.add("Less", [x, parts.constant(f"below {limit:g}", limit, _FLOAT)], ir.DataType.BOOL)


def _cast(parts: Replacement, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    return x if dtype in (None, x.dtype) else parts.add("Cast", [x], dtype, to=dtype)
