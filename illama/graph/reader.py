"""Reads ONNX files: values, constants, the layer of each node, and the dtype that each product runs in.

Every ONNX file of this project is read here, as an :class:`onnx_ir.Model`. Its values know their producers, uses,
dtypes and shapes, and every constant is an initializer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import onnx
import onnx_ir as ir
from annotated_types import Interval
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from illama.bundle import SOFTMAX_OUTPUT
from illama.errors import UserError
from illama.graph.check_graph import check_graph
from illama.graph.tensorrt_operators import MXFP8_DEQUANTIZE
from illama.quiet import quiet
from illama.structured_files import parse_json

LAYER = "layer"  # key in a node's metadata: the module that it was exported from
Precision = Literal["fp32", "fp16", "int8", "fp8", "mxfp8", "nvfp4"]
PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")
_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
_INTEGERS = (*_FOUR_BITS, ir.DataType.INT8, ir.DataType.UINT8)
_FLOAT8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_DEQUANTIZERS = ("DequantizeLinear", MXFP8_DEQUANTIZE)


def load_graph(path: Path) -> ir.Model:
    """Loads an ONNX file; external data is mapped to memory.

    Raises:
        UserError: see :func:`illama.graph.check_graph.check_graph`.
    """
    values = check_graph(path)
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(values)
        model = ir.from_proto(proto)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except Exception as error:  # the exceptions of onnx and onnx_ir have no other common base class
        raise UserError(f"{path} cannot be read as ONNX: {error}") from error
    ir.external_data.set_base_dir(model.graph, path.parent.absolute())
    return model


def to_bytes(model: ir.Model) -> bytes:
    """Returns the content of an ONNX file."""
    return ir.to_proto(model).SerializeToString()


def infer_shapes(model: ir.Model, batch: int) -> None:
    """Sets the shape and dtype of every value for a number of images, in place, as far as they can be inferred."""
    images = model.graph.inputs[0]
    assert images.shape is not None
    if not isinstance(images.shape[0], int):
        images.shape = ir.Shape([batch, *images.shape[1:]])
    with quiet("onnx_ir"):
        ShapeInferencePass(data_prop=True)(model)


def layer_of(node: ir.Node) -> str:
    """Returns the module that a node was exported from; the node's own name if the file does not say it."""
    return node.metadata_props.get(LAYER) or node.name or str(node.outputs[0].name)


def producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """Returns the node that computes a value if it is an operator of one of the kinds."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in kinds else None


def readers(value: ir.Value) -> list[ir.Node]:
    """Returns the nodes that read a value."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def is_constant(value: ir.Value | None) -> bool:
    """Returns whether a value is a constant of the file."""
    return value is not None and value.const_value is not None


def array(value: ir.Value | None) -> np.ndarray:
    """Returns the values of a constant."""
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def dtype_of(value: ir.Value) -> ir.DataType | None:
    """Returns the dtype of a value; that of a quantized value is its zero point's."""
    quantize = producer(value, "QuantizeLinear")
    if quantize is not None and len(quantize.inputs) > 2 and is_constant(quantize.inputs[2]):
        return dtype_of(quantize.inputs[2])  # type: ignore[arg-type]
    return value.const_value.dtype if value.const_value is not None else value.dtype


def stored(value: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """Returns an operand as it is stored, before views and dequantization, and the operator that dequantizes it."""
    node = value.producer()
    while node is not None and node.inputs[0] is not None and (node.op_type in _VIEWS or _casts_dequantized(node)):
        value = node.inputs[0]
        node = value.producer()
    if node is not None and node.op_type in _DEQUANTIZERS and node.inputs[0] is not None:
        return node.inputs[0], node
    return value, None


def _casts_dequantized(node: ir.Node) -> bool:
    """Whether a node casts what was dequantized by the scales of blocks, which are in float32."""
    dequantize = producer(node.inputs[0], "DequantizeLinear") if node.op_type == "Cast" else None
    return dequantize is not None and dequantize.attributes.get_int("block_size", 0) > 0


@dataclass(frozen=True)
class Product:
    """One product of a graph.

    Attributes:
        node: the operator; an Attention has two products.
        name: the operator's kind; with the operands, if the operator has two products.
        layer: the module that it was exported from.
        precision: the format in which the operands are multiplied.
        weights: dtype of a constant second operand as it is stored, if it is quantized; else empty.
    """

    node: ir.Node
    name: str
    layer: str
    precision: Precision
    weights: str


def products(model: ir.Model) -> Iterator[Product]:
    """Yields the products of a graph, in its order.

    A product runs in 8 bits if all of its operands come from DequantizeLinear: TensorRT, ONNX Runtime and OpenVINO then
    multiply the integers, and no runtime multiplies 4-bit integers without widening them. Otherwise it runs in floating
    point, and weights are dequantized. The second product of an Attention runs in 8 bits only if the first does: the
    kernel, not the graph, quantizes the probabilities.
    """
    for node in model.graph:
        if node.op_type in PRODUCTS:
            both = {"q k": 2, "p v": 3} if node.op_type == "Attention" else {"": 2}
            for operands, count in both.items():
                factors = [stored(value) for value in node.inputs[:count] if value is not None]
                weights = _name(*factors[-1]) if is_constant(factors[-1][0]) else ""
                formats = {_name(*each) for each in factors}
                name, precision = f"{node.op_type} {operands}".strip(), _precision(formats, node.outputs[0])
                yield Product(node, name, layer_of(node), precision, weights)


def _precision(formats: set[str], result: ir.Value) -> Precision:
    if formats <= {"int8", "int4"}:
        return "int8"
    for name in get_args(Precision):
        if formats == {name}:
            return name
    return "fp16" if result.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else "fp32"


def _name(value: ir.Value, dequantize: ir.Node | None) -> str:
    """Returns the number format of an operand as it is stored; empty if it is not quantized."""
    dtype = dtype_of(value)
    if dtype in _FLOAT8:
        return "mxfp8" if dequantize is not None and dequantize.op_type == MXFP8_DEQUANTIZE else "fp8"
    if dtype == ir.DataType.FLOAT4E2M1:
        return "nvfp4"
    return f"int{4 if dtype in _FOUR_BITS else 8}" if dtype in _INTEGERS else ""


def precisions(model: ir.Model) -> dict[str, str]:
    """Returns layer -> the precision that its products run in, and the dtype of their weights if it is another."""
    found: dict[str, dict[str, None]] = {}
    for each in products(model):
        weights = f", {each.weights} weights" if each.weights not in ("", each.precision) else ""
        found.setdefault(each.layer, {})[each.precision + weights] = None
    return {layer: " + ".join(names) for layer, names in found.items()}


@dataclass(frozen=True)
class SoftmaxOutput:
    """How the scheme quantizes the softmax output of one attention.

    Attributes:
        number: dtype, fp8 or int8.
        scale: quantization scale.
    """

    number: Literal["fp8", "int8"]
    scale: Annotated[float, Interval(gt=0, lt=math.inf)]

    @property
    def dtype(self) -> ir.DataType:
        return ir.DataType.INT8 if self.number == "int8" else ir.DataType.FLOAT8E4M3FN


def read_softmax_scales(model: ir.Model) -> dict[str, SoftmaxOutput]:
    """Returns attention -> how its softmax output is quantized, from the metadata that the exporter wrote."""
    text = model.metadata_props.get(SOFTMAX_OUTPUT, "{}")
    return parse_json(text, dict[str, SoftmaxOutput], f"the graph's metadata {SOFTMAX_OUTPUT}")


def has_constant(model: ir.Model, dtype: ir.DataType) -> bool:
    """Returns whether any constant has that dtype."""
    return any(dtype_of(value) == dtype for value in model.graph.initializers.values())


def has_4bit_activations(model: ir.Model) -> bool:
    """Returns whether any activation is quantized to 4 bits."""
    quantizers = (node for node in model.graph if node.op_type == "QuantizeLinear")
    return any(dtype_of(node.outputs[0]) in _FOUR_BITS for node in quantizers)


def add_constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    """Returns the graph's constant of that name, which is added if there is none."""
    if name not in graph.initializers:
        tensor = ir.tensor(values, name=name)
        shape, dtype = ir.Shape(values.shape), ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=dtype, const_value=tensor))
    return graph.initializers[name]
