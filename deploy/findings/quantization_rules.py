"""Rules about QuantizeLinear and DequantizeLinear outside of attention."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from deploy.findings.finding import Finding, Subject, found
from deploy.findings.patterns import NORMALIZATIONS, attentions_in_pieces, is_sum_of_squares, quantizer_of, weight_of
from illama.graph.reader import array, is_constant, producer, products


def check_residuals(subject: Subject) -> Iterator[Finding]:
    """Checks the additions of two computed values of one shape, outside of attention."""
    scores = {node for pieces in attentions_in_pieces(subject.model) for node in pieces.before}
    for node in subject.model.graph:
        if node.op_type == "QLinearAdd":
            yield found("quantized-residual", node, "an addition of integers")
        if node.op_type != "Add" or node in scores or any(map(is_constant, node.inputs)):
            continue
        count = sum(quantizer_of(value) is not None for value in node.inputs)
        if count and _same_shape(*node.inputs):
            yield found("quantized-residual", node, f"{count} of its 2 inputs quantized")


def _same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether two values have as many dimensions, and no sizes that are known to differ."""
    shapes = [value.shape if value is not None else None for value in (first, second)]
    if shapes[0] is None or shapes[1] is None or len(shapes[0]) != len(shapes[1]):
        return False
    pairs = zip(*shapes, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def check_normalizations(subject: Subject) -> Iterator[Finding]:
    """Checks the inputs of normalizations, as one operator and in pieces."""
    for node in subject.model.graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type in ("ReduceMean", "ReduceSum") and is_sum_of_squares(node):
            square = source.producer() if source is not None else None
            source = square.inputs[0] if square is not None else None
            centered = producer(source, "Sub")  # of a LayerNorm
            source = centered.inputs[0] if centered is not None else source
        elif node.op_type not in NORMALIZATIONS:
            continue
        if quantizer_of(source) is not None:
            yield found("quantized-normalization", node, "its input is quantized")


def check_stored_weights(subject: Subject) -> Iterator[Finding]:
    """Checks for floating-point constants behind a QuantizeLinear."""
    if subject.runtime is not None and subject.runtime.weakly_typed:
        return  # TensorRT 8, which takes them so
    for node in subject.model.graph:
        weight = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        tensor = weight.const_value if weight is not None else None
        if tensor is not None and tensor.size > 1:
            yield found("float-weights-quantized", node, f"{tensor.nbytes / 1e6:.2f} MB")


def check_scales(subject: Subject) -> Iterator[Finding]:
    """Checks the scales of all quantizers."""
    for node in subject.model.graph:
        scale = node.inputs[1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if scale is not None and is_constant(scale):
            values = array(scale).astype(np.float64)
            wrong = int((~(values > 0) | ~np.isfinite(values)).sum())
            if wrong:
                yield found("bad-scale", node, f"{wrong} of {values.size} scales are not positive numbers")


def check_product_shapes(subject: Subject) -> Iterator[Finding]:
    """Checks the sizes of products with constant weights; a network's last product cannot be another size."""
    if subject.for_cpu:
        return
    weighted = [each for each in products(subject.model) if each.node.op_type in ("MatMul", "Gemm")]
    for each in weighted:
        weight = weight_of(each.node)
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        block = 8 if each.precision in ("fp32", "fp16") else 16
        sizes, last = array(weight).shape, each is weighted[-1]
        if any(size % block for size in sizes):
            words = f"{' x '.join(map(str, sizes))} in {each.precision}{', the last product' * last}"
            yield found("product-shape", each.node, words, "note" if last else None)
