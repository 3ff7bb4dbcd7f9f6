"""Graph rewrites for OpenVINO's kernels on CPUs (docs/cpu.md has the gain of each).

A rewrite changes the model in memory, never the file. All except :func:`keep_inputs_float` are exact, up to float32
rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from illama.graph.reader import add_constant, array, dtype_of, is_constant, producer, readers

# If the products of one input have fewer outputs than this in total, quantizing the input costs more time than it
# saves. Measured, compared with bfloat16: not quantizing is faster at widths of 192 and 384, slower at 768.
_WORTH_QUANTIZING = 512
_ELEMENTWISE = ("Add", "Mul")
_LINEAR = ("Reshape", "Transpose", "RotaryEmbedding")  # a factor of the input is one of the output


def select_rewrites(bfloat16: bool, matrix_unit: bool) -> list[Callable[[ir.Model], None]]:
    """Returns the rewrites that make OpenVINO faster, in the order in which to apply them.

    Args:
        bfloat16: whether OpenVINO computes the float32 operators of the graph in bfloat16.
        matrix_unit: see :func:`has_matrix_unit`.
    """
    return [
        *([keep_inputs_float] if bfloat16 else []),
        split_products,
        fold_factors,  # after split_products, which gives q a product of its own
        *([fold_zero_points] if matrix_unit else []),
    ]


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

    matmul: ir.Node
    dequantize: ir.Node | None
    bias: ir.Node | None

    @property
    def output(self) -> ir.Value:
        return (self.bias or self.matmul).outputs[0]

    @property
    def columns(self) -> int:
        return array(self.dequantize.inputs[0] if self.dequantize else self.matmul.inputs[1]).shape[1]


def _find_product(value: ir.Value | None) -> _Product | None:
    """Returns the product, with its bias, whose result is ``value``; None if another node reads it before the bias."""
    bias = producer(value, "Add")
    if bias is not None:
        value = bias.inputs[0]
        if value is None or not is_constant(bias.inputs[1]) or len(readers(value)) > 1:
            return None
    matmul = producer(value, "MatMul")
    if matmul is None:
        return None
    dequantize = producer(matmul.inputs[1], "DequantizeLinear")
    weights = dequantize.inputs if dequantize is not None else matmul.inputs[1:]
    return _Product(matmul, dequantize, bias) if all(map(is_constant, weights)) else None


def keep_inputs_float(model: ir.Model, outputs: int = _WORTH_QUANTIZING) -> None:
    """Leaves the input of products with at most ``outputs`` outputs in floating point; their weights are dequantized.

        before   x -> QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(w))
        after    x -> MatMul(w), where w is a float32 constant

    Quantizing an input, once for all its products, costs a pass over it. After an element-wise operator, with which
    OpenVINO fuses it, it costs nothing: such inputs stay quantized.
    The result differs from that of the file, because one rounding is left out.
    """
    for quantize in _quantizers(model):
        found, source = _products_of(quantize), quantize.inputs[0]
        maker = source.producer() if source is not None else None
        width = sum(_weight(each).shape[1] for each in found)
        if maker is not None and maker.op_type not in _ELEMENTWISE and 0 < width <= outputs:
            for product in found:
                product.replace_input_with(0, source)
                name = f"{product.inputs[1].name}.float"  # type: ignore[union-attr]
                product.replace_input_with(1, add_constant(model.graph, name, _dequantized(product)))
    RemoveUnusedNodesPass()(model)


def split_products(model: ir.Model) -> None:
    """Replaces a product whose result is split by one product for each part.

    before   x -> MatMul(w) [-> Add(b)] -> Split -> q, k, v
    after    x -> MatMul(w_q) [-> Add(b_q)] -> q, and likewise k and v, with the columns of w and b
    """
    for split in [node for node in model.graph if node.op_type == "Split"]:
        product = _find_product(split.inputs[0])
        if product is not None and len(readers(product.output)) == 1 and _splits_evenly(split, product):
            size = product.columns // len(split.outputs)
            for part, output in enumerate(split.outputs):
                name, output.name = str(output.name), f"{output.name}.split"
                nodes = _columns(model.graph, product, slice(part * size, (part + 1) * size), name)
                model.graph.insert_before(split, nodes)
                _take_over(output, nodes[-1].outputs[0])
    RemoveUnusedNodesPass()(model)


def _splits_evenly(split: ir.Node, product: _Product) -> bool:
    """Whether the split is along the last of three axes, into equal parts."""
    sizes = array(split.inputs[1]) if len(split.inputs) > 1 and is_constant(split.inputs[1]) else None
    even = len(split.inputs) == 1 or (sizes is not None and len(set(sizes.tolist())) == 1)
    return split.attributes.get_int("axis", 0) in (-1, 2) and even and product.columns % len(split.outputs) == 0


def _columns(graph: ir.Graph, product: _Product, part: slice, output: str) -> list[ir.Node]:
    """Returns nodes that compute some columns of a product."""

    def of(value: ir.Value | None) -> ir.Value | None:
        if value is None or not array(value).ndim:
            return value
        return add_constant(graph, f"{output}.{value.name}", np.ascontiguousarray(array(value)[..., part]))

    nodes, old = [], product.dequantize
    if old is not None:
        inputs = [of(value) for value in old.inputs]
        nodes.append(_node("DequantizeLinear", inputs, f"{output}.weight", list(old.attributes.values())))
    weight = nodes[0].outputs[0] if nodes else of(product.matmul.inputs[1])
    result = f"{output}.product" if product.bias is not None else output
    nodes.append(_node("MatMul", [product.matmul.inputs[0], weight], result))
    if product.bias is not None:
        nodes.append(_node("Add", [nodes[-1].outputs[0], of(product.bias.inputs[1])], output))
    return nodes


def fold_factors(model: ir.Model) -> None:
    """Multiplies the weights of a product by the factor that its result is multiplied by, as q is in attention.

        before   x -> MatMul(w) [-> Add(b)] -> Reshape, Transpose, RotaryEmbedding -> Mul(s)
        after    x -> MatMul(s w) [-> Add(s b)] -> Reshape, Transpose, RotaryEmbedding

    Of a quantized weight, the scale is multiplied. It is exact if the factor s is a power of two, as it is for heads of
    16, 64 or 256 channels, and else up to float32 rounding.
    """
    for multiply in [node for node in model.graph if node.op_type == "Mul"]:
        scaled, factor = multiply.inputs
        if scaled is None or not is_constant(factor) or array(factor).size != 1:
            continue
        value: ir.Value | None = scaled
        while value is not None and len(readers(value)) == 1 and (maker := producer(value, *_LINEAR)):
            value = maker.inputs[0]
        product = _find_product(value)
        if product is not None and len(readers(product.output)) == 1:
            _scale(model.graph, product, array(factor).reshape(()))
            _take_over(multiply.outputs[0], scaled)
    RemoveUnusedNodesPass()(model)


def _scale(graph: ir.Graph, product: _Product, factor: np.ndarray) -> None:
    """Multiplies the weight and the bias of a product, by new constants: others may share the old ones."""
    for node in (product.dequantize or product.matmul, product.bias):
        if node is not None:
            old = node.inputs[1]
            node.replace_input_with(1, add_constant(graph, f"{node.outputs[0].name}.factor", array(old) * factor))


def fold_zero_points(model: ir.Model) -> None:
    """Makes every asymmetric input of a product symmetric, for runtimes that are slow with zero points.

        before   x -> QuantizeLinear(uint8, zero point z) -> DequantizeLinear -> MatMul(w) [-> Add(bias)]
        after    x -> Add((z - 128) s) -> QuantizeLinear(int8, 0) -> DequantizeLinear -> MatMul(w) -> Add(bias')

    s is the scale. The integers are the same, less 128. The bias compensates for the shift of the input:
    bias' = bias - (z - 128) s sum(w), with the dequantized w. The exporter writes graphs for TensorRT in this form
    (``quant.quantizers.layers.fold_zero_point``). OpenVINO is faster with it on a CPU with a matrix unit (docs/cpu.md).
    """
    for quantize in _quantizers(model):
        scale, zero, found = *quantize.inputs[1:3], _products_of(quantize)
        if is_constant(scale) and dtype_of(quantize.outputs[0]) == ir.DataType.UINT8 and found:
            shift = int(array(zero)) - 128
            offset = np.asarray(shift * array(scale), dtype=array(scale).dtype)
            for product in found:
                _compensate(model.graph, product, offset)
            _shift(model.graph, quantize, offset)
    RemoveUnusedNodesPass()(model)


def _quantizers(model: ir.Model) -> list[ir.Node]:
    """Returns the QuantizeLinear nodes with one constant zero point."""
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear" and len(node.inputs) == 3]
    return [node for node in nodes if is_constant(node.inputs[2]) and array(node.inputs[2]).size == 1]


def _products_of(quantize: ir.Node) -> list[ir.Node]:
    """Returns the products with constant weights that read a quantized value; none if another node reads it as well."""
    dequantize = readers(quantize.outputs[0])
    if any(node.op_type != "DequantizeLinear" or len(node.inputs) < 3 for node in dequantize):
        return []
    found = [reader for node in dequantize for reader in readers(node.outputs[0])]
    for reader in found:
        weight = producer(reader.inputs[1], "DequantizeLinear") if reader.op_type == "MatMul" else None
        if weight is None or not all(map(is_constant, weight.inputs)):
            return []
    return found


def _shift(graph: ir.Graph, quantize: ir.Node, offset: np.ndarray) -> None:
    result = quantize.outputs[0]
    if offset:
        constant = add_constant(graph, f"{result.name}.offset", offset)
        shifted = _node("Add", [quantize.inputs[0], constant], f"{result.name}.shifted")
        graph.insert_before(quantize, shifted)
        quantize.replace_input_with(0, shifted.outputs[0])
    zero = add_constant(graph, "zero.int8", np.array(0, dtype=np.int8))
    result.dtype = ir.DataType.INT8
    for node in (quantize, *readers(result)):
        node.replace_input_with(2, zero)


def _compensate(graph: ir.Graph, product: ir.Node, offset: np.ndarray) -> None:
    """Subtracts from a product with a constant weight what the offset of its input adds to it."""
    correction = (-float(offset) * _dequantized(product).sum(0, dtype=np.float64)).astype(np.float32)
    result = product.outputs[0]
    adds = [node for node in readers(result) if node.op_type == "Add" and is_constant(node.inputs[1])]
    if adds:
        # A new name, because products with equal biases share one constant.
        bias = add_constant(graph, f"{result.name}.bias", array(adds[0].inputs[1]) + correction)
        adds[0].replace_input_with(1, bias)
    elif offset:
        name, result.name = str(result.name), f"{result.name}.product"
        added = _node("Add", [None, add_constant(graph, f"{name}.bias", correction)], name)
        graph.insert_after(product, added)
        _take_over(result, added.outputs[0])
        added.replace_input_with(0, result)


def _weight(product: ir.Node) -> np.ndarray:
    """Returns the stored weight (inputs, outputs) of a product whose weight is dequantized."""
    return array(producer(product.inputs[1], "DequantizeLinear").inputs[0])  # type: ignore[union-attr]


def _dequantized(product: ir.Node) -> np.ndarray:
    """Returns a constant weight (inputs, outputs) in float32; its scale is per tensor, column or row block."""
    scale = array(producer(product.inputs[1], "DequantizeLinear").inputs[1])  # type: ignore[union-attr]
    weight = _weight(product).astype(np.float32)
    return weight * (scale if scale.ndim < 2 else scale.repeat(len(weight) // len(scale), axis=0))


def _node(kind: str, inputs: list[ir.Value | None], output: str, attributes: list[ir.Attr] | None = None) -> ir.Node:
    """Returns a node that has the name of its result."""
    return ir.Node("", kind, inputs, attributes or (), outputs=[ir.Value(name=output)], name=output)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Lets all readers of a value read another one of the same dtype and shape."""
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
