"""Rules about attention: whether a runtime can compute it with one fused kernel."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from deploy.findings.finding import Finding, Subject, found
from deploy.findings.patterns import Pieces, attentions_in_pieces, format_of, is_quantized_next, quantizer_of
from illama.bundle import SOFTMAX_OUTPUT

_WIDTHS, _MOST_TOKENS = (16, 32, 64), 512


def check_attentions(subject: Subject) -> Iterator[Finding]:
    """Checks every attention, as one operator and in pieces, unless the file is for a CPU."""
    if subject.for_cpu:
        return
    for pieces in attentions_in_pieces(subject.model):
        if not (subject.runtime and subject.runtime.lacks("Attention", 23)):
            yield found("attention-in-pieces", pieces.softmax, "the softmax of an attention")
        yield from _check_pieces(pieces)
    for node in subject.model.graph:
        if node.op_type == "Attention" and not node.domain.startswith("com."):
            yield from _check_operator(node, SOFTMAX_OUTPUT in subject.model.metadata_props)


def _check_pieces(pieces: Pieces) -> Iterator[Finding]:
    if any(node.op_type == "QuantizeLinear" for node in pieces.before):
        yield found("attention-scores-quantized", pieces.softmax, "the input of this softmax is quantized")
    operands = dict(zip("qk", pieces.scores.inputs, strict=False)) | dict(zip("pv", pieces.values.inputs, strict=False))
    quantizers = {name: quantizer_of(value) for name, value in operands.items()}
    yield from _check_operands(pieces.softmax, quantizers)
    if all(quantizers.values()):
        if not is_quantized_next(pieces.values.outputs[0]):
            yield found("attention-partly-quantized", pieces.softmax, "its operands are quantized, but not its result")
        yield from _check_size(pieces.softmax, quantizers["q"], operands["q"], pieces.softmax.outputs[0])


def _check_operator(node: ir.Node, softmax_is_quantized: bool) -> Iterator[Finding]:
    quantizers = {name: quantizer_of(value) for name, value in zip("qkv", node.inputs, strict=False)}
    yield from _check_operands(node, quantizers)
    if all(quantizers.values()) and softmax_is_quantized:
        yield from _check_size(node, quantizers["q"], node.inputs[0], node.inputs[1])


def _check_operands(node: ir.Node, quantizers: dict[str, ir.Node | None]) -> Iterator[Finding]:
    missing = [name for name, quantizer in quantizers.items() if quantizer is None]
    if missing and len(missing) < len(quantizers):
        present = ", ".join(name for name in quantizers if name not in missing)
        words = f"{present} quantized, {', '.join(missing)} not (p is the softmax output)"
        yield found("attention-partly-quantized", node, words)


def _check_size(
    node: ir.Node, quantizer: ir.Node | None, q: ir.Value | None, keys: ir.Value | None
) -> Iterator[Finding]:
    """Checks the sizes of 8-bit attention; ``keys`` has as many rows or columns as there are keys."""
    if quantizer is None or format_of(quantizer) not in (ir.DataType.INT8, ir.DataType.UINT8):
        return
    width = _size(q, -1)
    tokens = _size(keys, -1 if node.op_type == "Softmax" else -2)
    if (width and width not in _WIDTHS) or (tokens and tokens > _MOST_TOKENS):
        yield found("attention-without-int8-kernel", node, f"heads of {width} channels, {tokens} keys")


def _size(value: ir.Value | None, dim: int) -> int | None:
    shape = value.shape if value is not None else None
    size = shape[dim] if shape is not None and len(shape) > 1 else None
    return size if isinstance(size, int) else None
