"""Graphs in an older ONNX opset, for runtimes that do not load opset 23.

The graph is rewritten, not exported again, so that its weights and scales stay the same numbers. Operators that the
opset or the runtime does not have become a few that it has:

| operator           | since opset | becomes                                                                          |
|--------------------|-------------|----------------------------------------------------------------------------------|
| Attention          | 23          | MatMul, Add (mask), Softmax, MatMul: what TensorRT's compiler fuses before 10.14 |
| RMSNormalization   | 23          | Mul, ReduceMean, Add, Sqrt, Div, Mul in float32                                  |
| LayerNormalization | 17          | the same after Sub, for runtimes that do not have the operator                   |
| RotaryEmbedding    | 23          | Split, Concat, 2 Mul, Add                                                        |
| Gelu               | 20          | Erf or Tanh, Mul, Add                                                            |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from deploy.versions import LoadedBy
from illama.errors import UserError
from illama.graph.decompose_attention import decompose_attention
from illama.graph.emulate_half import emulate_half
from illama.graph.reader import add_constant, array, dtype_of, is_constant, layer_of, producer, read_softmax_scales
from illama.graph.replacement import Replacement
from illama.graph.tensorrt_operators import DOMAIN

OPSETS = (23, 21, 19, 17)
_Decomposition = Callable[[Replacement], ir.Value]
_FLOAT = ir.DataType.FLOAT
# Added to the score of a masked key. Its exponential is 0 in every precision, and unlike the lowest number of float16
# it stays finite when a score is added; a fused kernel makes NaN of keys that are all at minus infinity.
_MASKED = -(2.0**15)


def lower_for(model: ir.Model, runtime: LoadedBy) -> bool:
    """Rewrites a graph, in place, in the newest opset that a runtime loads; returns False if it loads the graph as is.

    Raises:
        UserError: the runtime has no form of an operator or of a number format.
    """
    for node in model.graph:
        if node.domain == DOMAIN and runtime.lacks(node.op_type, 1):
            raise UserError(f"{runtime} has no {node.op_type}: use another scheme")
    given = model.opset_imports.get("", 0)
    if not 0 < given <= max(OPSETS[0], runtime.opset):
        raise UserError(f"the graph is in opset {given}, and only those up to {OPSETS[0]} have an older form")
    kinds = {node.op_type for node in model.graph if node.domain != DOMAIN}
    for opset in OPSETS:
        lacking = {kind for kind in kinds if (since := _since(kind, opset)) and runtime.lacks(kind, since)}
        if opset <= runtime.opset and lacking <= _DECOMPOSITIONS.keys() | {"Attention"}:
            break
    quantized = [node.inputs[0] for node in model.graph if node.op_type == "DequantizeLinear"]
    for dtype in {dtype_of(value) for value in quantized if value is not None}:
        if dtype is not None and not runtime.has_format(dtype.name):
            raise UserError(f"{runtime} loads no {dtype.name} here: use another scheme")
    if model.graph.inputs[0].dtype == ir.DataType.UINT8 and runtime.lacks("uint8 images", 13):
        raise UserError(f"{runtime} takes no uint8 images: give the bundle without preprocessing")
    if not lacking and (opset >= given or given > OPSETS[0]):
        return False
    lower_opset(model, opset, lacking)
    if runtime.weakly_typed:
        _quantize_weights(model.graph)
    return True


def lower_opset(model: ir.Model, opset: int, missing: Collection[str] = ()) -> None:
    """Rewrites a graph in an older opset and the IR version that came with it, in place.

    Before opset 19, Q/DQ have float32 inputs and scales only, so that a graph in half precision becomes float32.

    Args:
        opset: one of :data:`OPSETS`, not newer than the graph's.
        missing: operators that the runtime does not have, although the opset does.

    Raises:
        UserError: the opset has no form of an operator or of its number format.
    """
    graph = model.graph
    standard = [node for node in graph if node.domain != DOMAIN]
    absent = {node.op_type for node in standard if node.op_type in missing or not _since(node.op_type, opset)}
    if "Attention" in absent:
        _split_attentions(model)
    if opset < 19:
        emulate_half(model, rounding=False)
    for node in list(graph):
        if node.op_type in absent:
            _decompose(graph, node, opset)
    for node in graph:
        if node.domain != DOMAIN:
            _adapt(graph, node, opset)
    model.opset_imports[""] = opset
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    ir.passes.Sequential(
        passes.IdentityEliminationPass(),
        passes.DeduplicateInitializersPass(size_limit=2**40),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    )(model)


def _split_attentions(model: ir.Model) -> None:
    """Replaces every Attention by its parts: MatMul, Add (mask), Softmax, MatMul."""
    outputs = read_softmax_scales(model)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        _add_mask(model.graph, node)
        decompose_attention(model.graph, node, outputs.get(layer_of(node)))


def _quantize_weights(graph: ir.Graph) -> None:
    """Stores 8-bit weights in float32, as TensorRT 8 is documented to take them. The integers stay the same.

    before   weight (int8) -> DequantizeLinear
    after    weight (float32) -> QuantizeLinear -> DequantizeLinear, both with a zero point
    """
    for node in list(graph):
        weight = node.inputs[0]
        if node.op_type != "DequantizeLinear" or weight is None or not is_constant(weight):
            continue
        if not is_constant(node.inputs[1]) or (len(node.inputs) > 2 and array(node.inputs[2]).any()):
            raise UserError(f"{layer_of(node)} has weights with a zero point, or a scale that is computed")
        parts, scale = Replacement(graph, node), array(node.inputs[1])
        axis = node.attributes.get_int("axis", 1) % max(1, array(weight).ndim)
        along = scale.reshape([-1 if dim == axis else 1 for dim in range(array(weight).ndim)]) if scale.ndim else scale
        wide = parts.constant("weight", array(weight).astype(np.float32) * along, _FLOAT)
        zero = parts.constant("zero_point", np.zeros(scale.shape), ir.DataType.INT8)
        steps = [node.inputs[1], zero]
        quantized = parts.add("QuantizeLinear", [wide, *steps], ir.DataType.INT8, axis=axis)
        parts.finish(parts.add("DequantizeLinear", [quantized, *steps], _FLOAT, axis=axis))


def _since(kind: str, opset: int) -> int | None:
    """Returns the opset that an operator has had its form since; None if the opset does not have the operator."""
    schema = _schema(kind, opset)
    return schema.since_version if schema else None


def _schema(kind: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(kind, opset)
    except onnx.defs.SchemaError:
        return None


def _add_mask(graph: ir.Graph, attention: ir.Node) -> None:
    """Replaces a boolean mask by one that is added to the scores, which every kernel for attention takes.

    before   Attention(q, k, v, allowed)
    after    Attention(q, k, v, 0 where allowed, else -32768)
    """
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is not None and mask.dtype == ir.DataType.BOOL and is_constant(mask):
        dtype = attention.outputs[0].dtype or _FLOAT
        numbers = np.where(array(mask), 0.0, _MASKED).astype(dtype.numpy())
        attention.replace_input_with(3, add_constant(graph, f"{mask.name}.{dtype.name.lower()}", numbers))


def _decompose(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    """Replaces an operator that the runtime does not have; raises UserError if there is no other form of it."""
    if node.op_type not in _DECOMPOSITIONS:
        raise UserError(f"{layer_of(node)} needs {node.op_type}, which opset {opset} does not have: give a newer one")
    parts = Replacement(graph, node)
    parts.finish(_DECOMPOSITIONS[node.op_type](parts))


def _normalize(center: bool, parts: Replacement) -> ir.Value:
    """Replaces RMSNormalization or, with ``center``, LayerNormalization.

    before   RMSNormalization(x, weight)
    after    x / Sqrt(ReduceMean(x * x) + epsilon) * weight, in float32
    """
    node = parts.node
    x, weight, bias = [*node.inputs, None][:3]
    assert x is not None and weight is not None and x.dtype is not None and x.shape is not None
    if node.attributes.get_int("axis", -1) not in (-1, len(x.shape) - 1):
        raise UserError(f"{layer_of(node)} normalizes over several axes: this is not supported in an older opset")
    narrow, mean = x.dtype, partial(parts.add, "ReduceMean", axes=(-1,), keepdims=1)

    def wide(value: ir.Value) -> ir.Value:
        return value if value.dtype == _FLOAT else parts.add("Cast", [value], _FLOAT, to=_FLOAT)

    x = wide(x)
    if center:
        x = parts.add("Sub", [x, mean([x])])
    epsilon = parts.constant("epsilon", node.attributes.get_float("epsilon", 1e-5), _FLOAT)
    power = parts.add("Add", [mean([parts.add("Mul", [x, x])]), epsilon])
    result = parts.add("Mul", [parts.add("Div", [x, parts.add("Sqrt", [power])]), wide(weight)])
    if bias is not None:
        result = parts.add("Add", [result, wide(bias)])
    return result if narrow == _FLOAT else parts.add("Cast", [result], narrow, to=narrow)


def _rotate(parts: Replacement) -> ir.Value:
    """Replaces RotaryEmbedding, whose pairs are (x[i], x[i + d / 2]) here and whose positions are 0..N-1.

    before   RotaryEmbedding(x, cos, sin, positions)
    after    x * [cos, cos] + Concat(second half of x, first half) * [-sin, sin]
    """
    x, cos, sin, positions = [*parts.node.inputs, None][:4]
    assert x is not None and x.dtype is not None
    if positions is None or any(parts.node.attributes.get_int(n, 0) for n in ("interleaved", "rotary_embedding_dim")):
        raise UserError(f"{layer_of(parts.node)} rotates in a layout that is not supported in an older opset")
    expanded = producer(positions, "Expand")
    rows = expanded.inputs[0] if expanded is not None else positions
    if not all(map(is_constant, (rows, cos, sin))) or (array(rows).ravel() != np.arange(len(array(cos)))).any():
        raise UserError(f"{layer_of(parts.node)} has positions that are computed: this is not supported")
    table, minus = np.concatenate([array(cos)] * 2, -1), np.concatenate([-array(sin), array(sin)], -1)
    half = np.array([table.shape[-1] // 2] * 2)
    halves = parts.add_many("Split", [x, parts.constant("halves", half, ir.DataType.INT64)], 2, x.dtype, axis=-1)
    swapped = parts.add("Concat", halves[::-1], axis=-1)
    factors = [parts.constant("cos", table, x.dtype), parts.constant("sin", minus, x.dtype)]
    return parts.add("Add", [parts.add("Mul", [each, by]) for each, by in zip((x, swapped), factors, strict=True)])


def _gelu(parts: Replacement) -> ir.Value:
    """Replaces Gelu.

    before   Gelu(x)
    after    x * 0.5 * (1 + Erf(x / sqrt(2))), or with Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))
    """
    x = parts.node.inputs[0]
    assert x is not None and x.dtype is not None
    number = partial(parts.constant, dtype=x.dtype)
    if parts.node.attributes.get_string("approximate", "none") == "tanh":
        cube = parts.add("Mul", [parts.add("Mul", [x, x]), x])
        inner = parts.add("Add", [x, parts.add("Mul", [cube, number("cubic", 0.044715)])])
        step = parts.add("Tanh", [parts.add("Mul", [inner, number("slope", math.sqrt(2 / math.pi))])])
    else:
        step = parts.add("Erf", [parts.add("Mul", [x, number("slope", math.sqrt(0.5))])])
    return parts.add("Mul", [parts.add("Mul", [x, number("half", 0.5)]), parts.add("Add", [step, number("one", 1)])])


_DECOMPOSITIONS: dict[str, _Decomposition] = {
    "RMSNormalization": partial(_normalize, False),
    "LayerNormalization": partial(_normalize, True),
    "RotaryEmbedding": _rotate,
    "Gelu": _gelu,
}


def _adapt(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    """Gives an operator the form that it has in an older opset; raises UserError if it has none there."""
    schema, newest = _schema(node.op_type, opset), _schema(node.op_type, OPSETS[0])
    if node.domain or schema is None or newest is None:
        raise UserError(f"{layer_of(node)} is {node.domain}.{node.op_type}, which is not an operator of ONNX")
    _adapt_axes(graph, node, schema)
    for name in sorted(node.attributes.keys() - schema.attributes.keys()):
        default = onnx.helper.get_attribute_value(newest.attributes[name].default_value)
        default = default.decode() if isinstance(default, bytes) else default
        equal_parts = name == "num_outputs" and _splits_equally(node)
        if not equal_parts and node.attributes[name].value != default:
            raise UserError(f"opset {opset} has no {name} of {node.op_type} ({layer_of(node)}): give a newer one")
        node.attributes.pop(name)
    kinds = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    for formal, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, value in enumerate(values):
            kind = formal[min(index, len(formal) - 1)].type_str
            dtype = value.dtype if value is not None else None
            if dtype and f"tensor({dtype.name.lower()})" not in kinds.get(kind, [kind]):
                reason = f"opset {opset} has no {node.op_type} of {dtype.name} ({layer_of(node)})"
                raise UserError(f"{reason}: give a newer one, or another scheme")


def _adapt_axes(graph: ir.Graph, node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    """Moves the axes of a reduction to the place where the opset has them: an attribute, later an input."""
    if not node.op_type.startswith("Reduce"):
        return
    if "axes" in schema.attributes and len(node.inputs) > 1:
        if not is_constant(node.inputs[1]):
            raise UserError(f"{layer_of(node)} reduces over computed axes: this is not supported in an older opset")
        node.attributes.add(ir.AttrInt64s("axes", array(node.inputs[1]).tolist()))
        node.resize_inputs(1)
    elif "axes" not in schema.attributes and "axes" in node.attributes:
        axes = node.attributes.pop("axes").as_ints()
        constant = add_constant(graph, f"axes.{'.'.join(map(str, axes))}", np.array(axes, np.int64))
        node.resize_inputs(2)
        node.replace_input_with(1, constant)


def _splits_equally(node: ir.Node) -> bool:
    sizes = {value.shape[node.attributes.get_int("axis", 0)] for value in node.outputs if value.shape is not None}
    return len(sizes) == 1
