"""Cost of the products of an ONNX graph: operations, bytes, and the precision they run in.

Only products are counted: matrix products, convolutions and attention. A good runtime fuses everything else (norms,
activations, quantization, copies) into them or overlaps it with them, so the cost without it is a lower bound.

A product runs in 8 bits if both of its operands come from DequantizeLinear: TensorRT and ONNX Runtime then multiply
the integers. With one operand dequantized it runs in floating point, and reads that operand in its stored format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from eval.cost_model.devices import Precision
from illama.errors import UserError
from illama.graph.layer_times import layer_of_node

# Bits of the data types in the graphs; onnx has no table that covers the types narrower than a byte.
_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), 8),
    **dict.fromkeys((TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2), 8),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16, TensorProto.UINT16), 16),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64), 64),
}
_INTEGERS = (TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8)
_FLOAT8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")
_COUNTED = ("MatMul", "Gemm", "Conv", "Attention")
_UNCOUNTED = (
    "MatMulInteger",
    "QLinearMatMul",
    "ConvInteger",
    "QLinearConv",
    "ConvTranspose",
    "Einsum",
    "RNN",
    "LSTM",
    "GRU",
    "DeformConv",
)


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


@dataclass
class _Graph:
    """A graph with the shape and type of every tensor."""

    constants: dict[str, TensorProto] = field(default_factory=dict)
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    def elements(self, tensor: str) -> int:
        return math.prod(self.shapes[tensor])

    def bytes(self, tensor: str) -> float:
        return self.elements(tensor) * _BITS[self.types[tensor]] / 8

    def stored(self, tensor: str) -> tuple[str, float]:
        """Returns the tensor before views and DequantizeLinear, and the bytes of its scale and zero point."""
        node = self.producers.get(tensor)
        if node is not None and node.op_type == "DequantizeLinear":
            return node.input[0], sum(self.bytes(name) for name in node.input[1:] if name in self.constants)
        if node is not None and node.op_type in _VIEWS:
            return self.stored(node.input[0])
        return tensor, 0.0


def product_costs(path: Path, batch: int = 1) -> list[ProductCost]:
    """Returns the products of an ONNX file, for ``batch`` images, in the order of the graph.

    Raises:
        UserError: it is not an ONNX file, its shapes cannot be inferred, or it has an operator that cannot be counted.
    """
    model = _with_shapes(path, batch)
    graph = _read(model)
    names = {node.name.partition("/")[0] for node in model.graph.node}
    layers = dict.fromkeys(names | {f"{name}.{part}" for name in names for part in ("qk", "pv")})
    costs = []
    for node in model.graph.node:
        if node.op_type in _UNCOUNTED:
            raise UserError(
                f"{path} has the operator {node.op_type}, which cannot be counted: give a file of this project"
            )
        if node.op_type in _COUNTED:
            layer = layer_of_node(node.name, layers) or node.name.partition("/")[0] or node.output[0]
            costs += _attention(graph, node, layer) if node.op_type == "Attention" else [_product(graph, node, layer)]
    return costs


def _with_shapes(path: Path, batch: int) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        images = model.graph.input[0].type.tensor_type.shape.dim
        if not images[0].dim_value:
            images[0].dim_value = batch
        return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} not found: run python quant/ptq.py first") from error
    except Exception as error:  # the exceptions of protobuf and onnx share no other base class
        raise UserError(f"{path} cannot be read as ONNX: {' '.join(str(error).split())[:200]}") from error


def _read(model: onnx.ModelProto) -> _Graph:
    graph = _Graph({tensor.name: tensor for tensor in model.graph.initializer})
    graph.producers = {name: node for node in model.graph.node for name in node.output}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        graph.types[value.name] = tensor.elem_type
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            graph.shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    for name, constant in graph.constants.items():
        graph.shapes[name], graph.types[name] = tuple(constant.dims), constant.data_type
    unknown = [
        name
        for node in model.graph.node
        if node.op_type in _COUNTED
        for name in (*node.input, *node.output)
        if name and name not in graph.shapes
    ]
    if unknown:
        raise UserError(f"the shape of {unknown[0]} cannot be inferred: export the network at one image size")
    return graph


def _product(graph: _Graph, node: onnx.NodeProto, layer: str) -> ProductCost:
    """Returns the cost of a MatMul, Gemm or Conv: each output element is a sum of products over the reduced axes."""
    left, right = node.input[0], node.input[1]
    if node.op_type == "Conv":
        terms = math.prod(graph.shapes[right][1:])
    else:
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        terms = graph.shapes[left][-2 if transposed else -1]
    operations = 2 * graph.elements(node.output[0]) * terms
    precision = _precision(graph, (left, right), node.output[0])
    return ProductCost(layer, node.op_type, precision, operations, *_bytes(graph, node.input, node.output))


def _attention(graph: _Graph, node: onnx.NodeProto, layer: str) -> list[ProductCost]:
    """Returns the costs of the two products of an Attention operator; the probabilities between them stay on the chip.

    The second runs in 8 bits only if the first does: the kernel, not the graph, quantizes the probabilities.
    """
    q, k, v = node.input[:3]
    result, keys = node.output[0], graph.shapes[k][-2]
    scores, values = _precision(graph, (q, k), result), _precision(graph, (q, k, v), result)
    rest = [name for name in node.input[3:] if name]
    return [
        ProductCost(layer, "Attention q k", scores, 2 * graph.elements(q) * keys, *_bytes(graph, [q, k, *rest], [])),
        ProductCost(layer, "Attention p v", values, 2 * graph.elements(result) * keys, *_bytes(graph, [v], [result])),
    ]


def _precision(graph: _Graph, operands: tuple[str, ...], result: str) -> Precision:
    types = [graph.types[graph.stored(name)[0]] for name in operands]
    if all(each in _INTEGERS for each in types):
        return "int8"
    if all(each in _FLOAT8 for each in types):
        return "fp8"
    return "fp16" if _BITS[graph.types[result]] == 16 else "fp32"


def _bytes(graph: _Graph, inputs: list[str], outputs: list[str]) -> tuple[float, float]:
    """Returns the bytes of constant operands and of all other tensors; a tensor that occurs twice is read once."""
    weights, activations = 0.0, sum(graph.bytes(name) for name in outputs)
    for name in dict.fromkeys(name for name in inputs if name):
        tensor, scales = graph.stored(name)
        if tensor in graph.constants:
            weights += graph.bytes(tensor) + scales
        else:
            activations += graph.bytes(tensor)
    return weights, activations
