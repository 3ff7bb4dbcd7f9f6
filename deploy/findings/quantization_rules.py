"""Rules about QuantizeLinear and DequantizeLinear outside of attention."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deploy.findings.finding import Finding, Rule, Subject, found
from deploy.findings.patterns import NORMALIZATIONS, attentions_in_pieces, is_sum_of_squares, quantizer_of, weight_of
from illama.graph.reader import array, is_constant, products

RESIDUAL = Rule(
    "quantized-residual",
    "warning",
    "Q/DQ on the residual stream round what every later block adds to: ViTs lost all accuracy in public reports",
    "quantize only the inputs of Linears and convolutions",
    "https://github.com/alibaba/TinyNeuralNetwork/pull/204",
)
NORMALIZED = Rule(
    "quantized-normalization",
    "warning",
    "the input of a normalization is quantized: it has the residual stream's outliers, and no 8-bit kernel computes it",
    "quantize after the normalization, at the input of the Linear",
    "https://github.com/Jonah-May-OSS/wyoming-whisper-trt/pull/1052",
)
FLOAT_WEIGHTS = Rule(
    "float-weights-quantized",
    "note",
    "weights are stored in floating point before a QuantizeLinear: the file is two to four times as large",
    "store the 8-bit weights with a DequantizeLinear alone; TensorRT 8 is documented for floating point only",
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html",
)
BAD_SCALE = Rule(
    "bad-scale",
    "error",
    "a scale must be positive and finite: TensorRT stops with 'Scale coefficients must all be positive', others divide "
    "by zero",
    "calibrate again, with a smallest scale; a float16 scale becomes zero below 6e-8",
    "https://github.com/NVIDIA/TensorRT/issues/2498",
)
SHAPE = Rule(
    "product-shape",
    "warning",
    "tensor cores multiply blocks of 8 channels in 16 bits and 16 in 8 bits: other sizes are padded, or computed "
    "without them",
    "choose widths that are multiples of 16; leave a small product in float16",
    "https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html",
)


def check_residuals(subject: Subject) -> Iterator[Finding]:
    """Checks the additions of two computed values of one shape, outside of attention."""
    scores = {node for pieces in attentions_in_pieces(subject.model) for node in pieces.before}
    for node in subject.model.graph:
        if node.op_type == "QLinearAdd":
            yield found(RESIDUAL, node, "an addition of integers")
        if node.op_type != "Add" or node in scores or any(map(is_constant, node.inputs)):
            continue
        shapes = [value.shape for value in node.inputs if value is not None]
        if len(shapes) == 2 and shapes[0] == shapes[1] and any(map(quantizer_of, node.inputs)):
            count = sum(quantizer_of(value) is not None for value in node.inputs)
            yield found(RESIDUAL, node, f"{count} of its 2 inputs quantized")


def check_normalizations(subject: Subject) -> Iterator[Finding]:
    """Checks the inputs of normalizations, as one operator and in pieces."""
    for node in subject.model.graph:
        whole = node.op_type in NORMALIZATIONS
        source = node.inputs[0] if node.inputs else None
        if is_sum_of_squares(node) and source is not None and node.op_type in ("ReduceMean", "ReduceSum"):
            square = source.producer()
            assert square is not None
            source = square.inputs[0]
        elif not whole:
            continue
        if quantizer_of(source) is not None:
            yield found(NORMALIZED, node, "its input is quantized")


def check_stored_weights(subject: Subject) -> Iterator[Finding]:
    """Checks for floating-point constants behind a QuantizeLinear."""
    if subject.runtime is not None and subject.runtime.weakly_typed:
        return  # TensorRT 8, which takes them so
    for node in subject.model.graph:
        weight = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if (
            weight is not None
            and is_constant(weight)
            and weight.const_value is not None
            and weight.const_value.size > 1
        ):
            yield found(FLOAT_WEIGHTS, node, f"{weight.const_value.nbytes / 1e6:.2f} MB")


def check_scales(subject: Subject) -> Iterator[Finding]:
    """Checks the scales of all quantizers."""
    for node in subject.model.graph:
        scale = node.inputs[1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if scale is not None and is_constant(scale):
            values = array(scale).astype(np.float64)
            wrong = int((~(values > 0) | ~np.isfinite(values)).sum())
            if wrong:
                yield found(BAD_SCALE, node, f"{wrong} of {values.size} scales are not positive numbers")


def check_product_shapes(subject: Subject) -> Iterator[Finding]:
    """Checks the sizes of products with constant weights; a network's last product cannot be another size."""
    weighted = [each for each in products(subject.model) if each.node.op_type in ("MatMul", "Gemm")]
    for each in weighted:
        weight = weight_of(each.node)
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        block = 16 if each.precision in ("int8", "fp8") else 8
        sizes, last = array(weight).shape, each is weighted[-1]
        if any(size % block for size in sizes):
            words = f"{' x '.join(map(str, sizes))} in {each.precision}{', the last product' * last}"
            yield found(SHAPE, each.node, words, "note" if last else None)
