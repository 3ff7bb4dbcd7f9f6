"""Rewrites of an exported graph for whoever runs it. Each gives the same numbers.

A rewrite takes a model and returns a new one; the file stays as it is.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from illama.errors import UserError

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_TYPE_NAMES = {TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.INT4: "int4", TensorProto.UINT4: "int4",
               TensorProto.FLOAT8E4M3FN: "fp8"}  # fmt: skip


def load_graph(path: Path) -> ModelProto:
    """An ONNX file; UserError if there is none or it is damaged."""
    try:
        return onnx.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}: make it with python quant/ptq.py") from error
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file: make it again with python quant/ptq.py") from error


class _Index:
    """Who makes and who reads each value, and the constants."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def readers(self, name: str) -> list[NodeProto]:
        return [node for node in self.graph.node if name in node.input]

    def maker(self, name: str, kind: str) -> NodeProto | None:
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def add_constant(self, name: str, values: np.ndarray) -> str:
        if name not in self.constants:
            self.graph.initializer.append(numpy_helper.from_array(values, name))
            self.constants[name] = self.graph.initializer[-1]
        return name


def precisions(model: ModelProto) -> dict[str, str]:
    """Layer -> what its product is computed in: ``int8``, ``fp8``, or the float type, with its weights' own."""
    index = _Index(model)
    shapes = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*shapes.value_info, *shapes.input)}
    found = {}
    for node in model.graph.node:
        if node.op_type in _PRODUCTS:
            inputs = [_quantized_type(index, name) for name in node.input[:2]]
            wide = "float16" if types.get(node.output[0]) == TensorProto.FLOAT16 else "float32"
            if all(inputs):
                found[node.name] = str(inputs[1])
            else:
                found[node.name] = f"{wide}, {inputs[1]} weights" if inputs[1] else wide
    return found


def _quantized_type(index: _Index, name: str) -> str | None:
    dequantize = index.maker(name, "DequantizeLinear")
    if dequantize is None:
        return None
    source = dequantize.input[0]
    if quantize := index.maker(source, "QuantizeLinear"):
        source = quantize.input[2]
    return _TYPE_NAMES.get(index.constants[source].data_type) if source in index.constants else None


def has_fp8(model: ModelProto) -> bool:
    """Whether any tensor is FP8."""
    return any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)


def centre_inputs(model: ModelProto) -> ModelProto:
    """Make every asymmetric input of a product symmetric, for runtimes whose integer products have no zero point.

        before   x -> QuantizeLinear(uint8, zero point z) -> DequantizeLinear -> MatMul(w) [-> Add(bias)]
        after    x -> Add((z - 128) s) -> QuantizeLinear(int8, 0) -> DequantizeLinear -> MatMul(w) -> Add(bias')

    with s the scale, so that the 256 integers are the same ones, each less by 128; and the bias takes back what the
    shift added, bias' = bias - (z - 128) s sum(w), w as it is dequantized. Graphs for TensorRT are
    exported so (``quant.layers.centre``); OpenVINO's integer kernels gain a tenth (docs/cpu.md).
    """
    model = copy.deepcopy(model)
    index, inserted = _Index(model), _Inserted()
    for quantize in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        zero, products = index.constants[quantize.input[2]], _products_of(index, quantize)
        if zero.data_type == TensorProto.UINT8 and products:
            scale, shift = index.array(quantize.input[1]), int(index.array(quantize.input[2])) - 128
            offset = np.asarray(shift * scale, dtype=scale.dtype)
            for product in products:
                _take_back(index, product, offset, inserted)
            _shift(index, quantize, offset, inserted)
    inserted.apply(model)
    del model.graph.value_info[:]  # which says what types the values had
    return model


class _Inserted:
    """New nodes and their places: before or behind the node that makes a value."""

    def __init__(self) -> None:
        self.before: dict[str, NodeProto] = {}
        self.behind: dict[str, NodeProto] = {}

    def apply(self, model: ModelProto) -> None:
        nodes: list[NodeProto] = []
        for node in model.graph.node:
            first, last = self.before.get(node.output[0]), self.behind.get(node.output[0])
            nodes += [copy.deepcopy(each) for each in (first, node, last) if each is not None]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _products_of(index: _Index, quantize: NodeProto) -> list[NodeProto]:
    """The products with constant weights that read a quantized value, if nothing else reads it."""
    dequantize = index.readers(quantize.output[0])
    readers = [reader for node in dequantize for reader in index.readers(node.output[0])]
    for reader in readers:
        weight = index.maker(reader.input[1], "DequantizeLinear") if reader.op_type == "MatMul" else None
        if weight is None or weight.input[0] not in index.constants:
            return []
    return readers


def _shift(index: _Index, quantize: NodeProto, offset: np.ndarray, inserted: _Inserted) -> None:
    base = quantize.output[0]
    if offset:
        constant = index.add_constant(f"{base}.offset", offset)
        inserted.before[base] = helper.make_node("Add", [quantize.input[0], constant], [f"{base}.moved"])
        quantize.input[0] = f"{base}.moved"
    quantize.input[2] = index.add_constant("zero.int8", np.array(0, dtype=np.int8))
    for dequantize in index.readers(base):
        dequantize.input[2] = "zero.int8"


def _take_back(index: _Index, product: NodeProto, offset: np.ndarray, inserted: _Inserted) -> None:
    """Subtract from a product with a constant weight what the offset of its input adds to it."""
    dequantize = index.makers[product.input[1]]
    weight, scale = index.array(dequantize.input[0]).astype(np.float64), index.array(dequantize.input[1])
    weight = weight * (scale if scale.ndim < 2 else scale.repeat(len(weight) // len(scale), axis=0))
    moved = (-float(offset) * weight.sum(0)).astype(np.float32)
    bias = next((node for node in index.readers(product.output[0])
                 if node.op_type == "Add" and node.input[1] in index.constants), None)  # fmt: skip
    if bias is not None:
        # A name of its own: equal biases are one constant.
        bias.input[1] = index.add_constant(f"{product.output[0]}.bias", index.array(bias.input[1]) + moved)
    elif offset:
        result = product.output[0]
        product.output[0] = f"{result}.product"
        constant = index.add_constant(f"{result}.bias", moved)
        inserted.behind[product.output[0]] = helper.make_node("Add", [product.output[0], constant], [result])
