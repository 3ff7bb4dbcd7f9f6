"""Graph rewrites for OpenVINO's kernels on CPUs (docs/cpu.md has the gain of each).

A rewrite changes the model in memory, never the file. All except :func:`keep_inputs_float` are exact, up to float32
rounding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from illama.graph.reader import Index

# If the products of one input have fewer outputs than this in total, quantizing the input costs more time than it
# saves. Measured, compared with bfloat16: not quantizing is faster at widths of 192 and 384, slower at 768.
_WORTH_QUANTIZING = 512
_ELEMENTWISE = ("Add", "Mul")


def select_rewrites(bfloat16: bool, matrix_unit: bool) -> list[Callable[[ModelProto], None]]:
    """Returns the rewrites that make OpenVINO faster, in the order in which to apply them.

    Args:
        bfloat16: whether OpenVINO computes the float32 operators of the graph in bfloat16.
        matrix_unit: see :func:`has_matrix_unit`.
    """
    return [*([keep_inputs_float] if bfloat16 else []), split_products, *([fold_zero_points] if matrix_unit else [])]


def has_matrix_unit(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether oneDNN, whose kernels OpenVINO uses, multiplies integers in a matrix unit of this CPU (AMX)."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return (allowed == "DEFAULT" or "AMX" in allowed) and cpuinfo.exists() and "amx_int8" in cpuinfo.read_text()


@dataclass(frozen=True)
class _Product:
    """A product with a constant weight, and its bias.

    Attributes:
        matmul: the MatMul node.
        dequantize: the DequantizeLinear node of the weight (inputs, outputs), if the weight is quantized.
        bias: the node that adds a constant to the product, if there is one.
    """

    matmul: NodeProto
    dequantize: NodeProto | None
    bias: NodeProto | None

    @property
    def output(self) -> str:
        return (self.bias or self.matmul).output[0]

    def columns(self, index: Index) -> int:
        return index.array(self.dequantize.input[0] if self.dequantize else self.matmul.input[1]).shape[1]


def _find_product(index: Index, value: str) -> _Product | None:
    """Returns the product, with its bias, whose result is ``value``; None if another node reads it before the bias."""
    bias = index.maker(value, "Add")
    if bias is not None and (bias.input[1] not in index.constants or len(index.readers(bias.input[0])) > 1):
        return None
    matmul = index.maker(bias.input[0] if bias is not None else value, "MatMul")
    if matmul is None:
        return None
    dequantize = index.maker(matmul.input[1], "DequantizeLinear")
    weight = dequantize.input[0] if dequantize is not None else matmul.input[1]
    return _Product(matmul, dequantize, bias) if weight in index.constants else None


def keep_inputs_float(model: ModelProto, outputs: int = _WORTH_QUANTIZING) -> None:
    """Leaves the input of products with at most ``outputs`` outputs in floating point; their weights are dequantized.

        before   x -> QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(w))
        after    x -> MatMul(w), where w is a float32 constant

    Quantizing an input, once for all its products, costs a pass over it. After an element-wise operator, with which
    OpenVINO fuses it, it costs nothing: such inputs stay quantized.
    The result differs from that of the file, because one rounding is left out.
    """
    index = Index(model)
    for quantize in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        products, maker = _products_of(index, quantize), index.makers.get(quantize.input[0])
        width = sum(index.array(index.makers[each.input[1]].input[0]).shape[1] for each in products)
        if maker is not None and maker.op_type not in _ELEMENTWISE and 0 < width <= outputs:
            for product in products:
                dequantize = index.makers[product.input[1]]
                product.input[0] = quantize.input[0]
                product.input[1] = index.add_constant(f"{dequantize.output[0]}.float", _dequantized(index, dequantize))
    _prune(model)


def split_products(model: ModelProto) -> None:
    """Replaces a product whose result is split by one product for each part.

    before   x -> MatMul(w) [-> Add(b)] -> Split -> q, k, v
    after    x -> MatMul(w_q) [-> Add(b_q)] -> q, and likewise k and v, with the columns of w and b
    """
    index = Index(model)
    replaced: dict[str, list[NodeProto]] = {}
    for split in [node for node in model.graph.node if node.op_type == "Split"]:
        product = _find_product(index, split.input[0])
        if product is not None and len(index.readers(product.output)) == 1 and _splits_evenly(index, split, product):
            size = product.columns(index) // len(split.output)
            replaced[split.output[0]] = [
                node
                for part, output in enumerate(split.output)
                for node in _columns(index, product, slice(part * size, (part + 1) * size), output)
            ]
    _replace(model, replaced)
    _prune(model)


def _splits_evenly(index: Index, split: NodeProto, product: _Product) -> bool:
    """Whether the split is along the last of three axes, into equal parts."""
    axis = next((helper.get_attribute_value(each) for each in split.attribute if each.name == "axis"), 0)
    sizes = index.array(split.input[1]) if len(split.input) > 1 and split.input[1] in index.constants else None
    even = len(split.input) == 1 or (sizes is not None and len(set(sizes.tolist())) == 1)
    return axis in (-1, 2) and even and product.columns(index) % len(split.output) == 0


def _columns(index: Index, product: _Product, part: slice, output: str) -> list[NodeProto]:
    """Returns nodes that compute some columns of a product."""

    def of(name: str) -> str:
        values = index.array(name)
        return index.add_constant(f"{output}.{name}", np.ascontiguousarray(values[..., part])) if values.ndim else name

    nodes, weight = [], product.matmul.input[1]
    if product.dequantize is not None:
        dequantize = copy.deepcopy(product.dequantize)
        dequantize.input[:] = [of(name) for name in dequantize.input]
        dequantize.name = dequantize.output[0] = weight = f"{output}.weight"
        nodes.append(dequantize)
    else:
        weight = of(weight)
    result = f"{output}.product" if product.bias is not None else output
    nodes.append(helper.make_node("MatMul", [product.matmul.input[0], weight], [result], name=result))
    if product.bias is not None:
        nodes.append(helper.make_node("Add", [result, of(product.bias.input[1])], [output], name=output))
    return nodes


def fold_zero_points(model: ModelProto) -> None:
    """Makes every asymmetric input of a product symmetric, for runtimes that are slow with zero points.

        before   x -> QuantizeLinear(uint8, zero point z) -> DequantizeLinear -> MatMul(w) [-> Add(bias)]
        after    x -> Add((z - 128) s) -> QuantizeLinear(int8, 0) -> DequantizeLinear -> MatMul(w) -> Add(bias')

    s is the scale. The integers are the same, less 128. The bias compensates for the shift of the input:
    bias' = bias - (z - 128) s sum(w), with the dequantized w. The exporter writes graphs for TensorRT in this form
    (``quant.quantizers.layers.fold_zero_point``). OpenVINO is faster with it on a CPU with a matrix unit (docs/cpu.md).
    """
    index = Index(model)
    replaced: dict[str, list[NodeProto]] = {}
    for quantize in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        zero, products = index.constants[quantize.input[2]], _products_of(index, quantize)
        if zero.data_type == TensorProto.UINT8 and products:
            scale, shift = index.array(quantize.input[1]), int(index.array(quantize.input[2])) - 128
            offset = np.asarray(shift * scale, dtype=scale.dtype)
            for product in products:
                _compensate(index, product, offset, replaced)
            _shift(index, quantize, offset, replaced)
    _replace(model, replaced)
    _prune(model)


def _products_of(index: Index, quantize: NodeProto) -> list[NodeProto]:
    """Returns the products with constant weights that read a quantized value; none if another node reads it as well."""
    dequantize = index.readers(quantize.output[0])
    readers = [reader for node in dequantize for reader in index.readers(node.output[0])]
    for reader in readers:
        weight = index.maker(reader.input[1], "DequantizeLinear") if reader.op_type == "MatMul" else None
        if weight is None or weight.input[0] not in index.constants:
            return []
    return readers


def _shift(index: Index, quantize: NodeProto, offset: np.ndarray, replaced: dict[str, list[NodeProto]]) -> None:
    base = quantize.output[0]
    if offset:
        constant = index.add_constant(f"{base}.offset", offset)
        replaced[base] = [helper.make_node("Add", [quantize.input[0], constant], [f"{base}.shifted"]), quantize]
        quantize.input[0] = f"{base}.shifted"
    quantize.input[2] = index.add_constant("zero.int8", np.array(0, dtype=np.int8))
    for dequantize in index.readers(base):
        dequantize.input[2] = "zero.int8"


def _compensate(index: Index, product: NodeProto, offset: np.ndarray, replaced: dict[str, list[NodeProto]]) -> None:
    """Subtracts from a product with a constant weight what the offset of its input adds to it."""
    columns = _dequantized(index, index.makers[product.input[1]]).sum(0, dtype=np.float64)
    correction = (-float(offset) * columns).astype(np.float32)
    bias = next(
        (
            node
            for node in index.readers(product.output[0])
            if node.op_type == "Add" and node.input[1] in index.constants
        ),
        None,
    )
    if bias is not None:
        # A new name, because products with equal biases share one constant.
        bias.input[1] = index.add_constant(f"{product.output[0]}.bias", index.array(bias.input[1]) + correction)
    elif offset:
        result = product.output[0]
        product.output[0] = f"{result}.product"
        constant = index.add_constant(f"{result}.bias", correction)
        replaced[product.output[0]] = [product, helper.make_node("Add", [product.output[0], constant], [result])]


def _dequantized(index: Index, dequantize: NodeProto) -> np.ndarray:
    """Returns a constant weight (inputs, outputs) in float32; its scale is per tensor, column or row block."""
    weight, scale = index.array(dequantize.input[0]).astype(np.float32), index.array(dequantize.input[1])
    return weight * (scale if scale.ndim < 2 else scale.repeat(len(weight) // len(scale), axis=0))


def _replace(model: ModelProto, replaced: Mapping[str, list[NodeProto]]) -> None:
    """Replaces the nodes whose first outputs are the keys of ``replaced``."""
    nodes = [copy.deepcopy(each) for node in model.graph.node for each in replaced.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # the types of the values before the rewrite


def _prune(model: ModelProto) -> None:
    """Removes nodes and constants that are not used."""
    graph = model.graph
    used, nodes = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            used.update(node.input)
            nodes.append(copy.deepcopy(node))
    constants = [copy.deepcopy(tensor) for tensor in graph.initializer if tensor.name in used]
    for field, kept in ((graph.node, reversed(nodes)), (graph.initializer, constants)):
        del field[:]
        field.extend(kept)
