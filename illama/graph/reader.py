"""Reads ONNX files: nodes, constants, and the dtype of each matrix product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from illama.errors import UserError

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_TYPE_NAMES = {
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
}


def load_graph(path: Path) -> ModelProto:
    """Loads an ONNX file; raises UserError if it is missing or damaged."""
    try:
        return onnx.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}: make it with python quant/ptq.py") from error
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file: make it again with python quant/ptq.py") from error


class Index:
    """Looks up the node that makes a value, the nodes that read it, and the constants of a graph."""

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
    """Returns layer -> dtype of its product: ``int8``, ``fp8``, or the float dtype and that of quantized weights."""
    index = Index(model)
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


def _quantized_type(index: Index, name: str) -> str | None:
    dequantize = index.maker(name, "DequantizeLinear")
    if dequantize is None:
        return None
    source = dequantize.input[0]
    if quantize := index.maker(source, "QuantizeLinear"):
        source = quantize.input[2]
    return _TYPE_NAMES.get(index.constants[source].data_type) if source in index.constants else None


def has_fp8(model: ModelProto) -> bool:
    """Returns whether any tensor is FP8."""
    return any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)


def has_4bit_activations(model: ModelProto) -> bool:
    """Whether any activation is quantized to 4 bits."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zero_points = [node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[2:]]
    return any(types.get(name) in (TensorProto.INT4, TensorProto.UINT4) for name in zero_points)
