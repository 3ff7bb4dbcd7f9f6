"""Rules about half precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from deploy.findings.finding import Finding, Subject, found
from deploy.findings.patterns import VIEWS, is_sum_of_squares
from illama.graph.reader import array, readers

# Operators through which minus infinity can reach the scores of attention.
_MASKING = (
    *("Add", "Where", "Max", "Min", "Clip", "Sub", "Expand", "Concat", "Slice", "Attention", "Trilu", "Pad", "Equal"),
    *("Gather", "Tile", "IsInf", *VIEWS),
)


def check_squares(subject: Subject) -> Iterator[Finding]:
    """Checks normalizations in pieces that compute in float16."""
    for node in subject.model.graph:
        value = node.inputs[0] if node.inputs else None
        if value is not None and value.dtype == ir.DataType.FLOAT16 and is_sum_of_squares(node):
            yield found("half-precision-squares", node, "squares in float16")


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
            yield found("constant-overflow", str(value.name), f"{int(wrong.sum())} of {values.size} numbers")
