"""Rules about half precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from deploy.findings.finding import Finding, Rule, Subject, found
from deploy.findings.patterns import is_sum_of_squares
from illama.graph.reader import array, readers

SQUARES = Rule(
    "half-precision-squares",
    "warning",
    "a normalization squares its input in float16, which overflows above 255 and gives infinity",
    "compute the normalization in float32, between two Casts",
    "https://github.com/microsoft/onnxruntime/pull/13639",
)
OVERFLOW = Rule(
    "constant-overflow",
    "error",
    "a constant is infinite or not a number, since it left the range of float16 (65504)",
    "keep this layer in float32 or bfloat16; python quant/ptq.py finds such layers and does so",
    "https://github.com/NVIDIA/TensorRT/issues/4748",
)
_MASKING = ("Add", "Where", "Max", "Min", "Clip", "Sub", "Expand", "Concat", "Slice", "Unsqueeze", "Cast", "Attention")


def check_squares(subject: Subject) -> Iterator[Finding]:
    """Checks normalizations in pieces that compute in float16."""
    for node in subject.model.graph:
        value = node.inputs[0] if node.inputs else None
        if value is not None and value.dtype == ir.DataType.FLOAT16 and is_sum_of_squares(node):
            yield found(SQUARES, node, "squares in float16")


def check_constants(subject: Subject) -> Iterator[Finding]:
    """Checks floating-point constants for infinities and NaN; minus infinity may be a mask."""
    for value in subject.model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            continue
        values = array(value).astype(np.float32)
        masks = all(node.op_type in _MASKING for node in readers(value))
        wrong = ~np.isfinite(values) & ~((values == -np.inf) & masks)
        if wrong.any():
            yield found(OVERFLOW, str(value.name), f"{int(wrong.sum())} of {values.size} numbers")
