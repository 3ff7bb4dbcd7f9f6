"""Rules about what a runtime loads, by the facts in versions.yaml."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from deploy.findings.finding import Finding, Rule, Subject, found
from deploy.versions import LoadedBy
from illama.graph.reader import array, dtype_of, is_constant

_TABLE = "deploy/versions.yaml"
TOO_NEW = Rule(
    "version-too-new",
    "error",
    "the runtime does not load the file's opset or IR version, or reads its operators with an older meaning",
    "python deploy/downgrade.py rewrites a bundle's graphs; other files: export them in an older opset",
    _TABLE,
)
NO_OPERATOR = Rule(
    "operator-not-supported",
    "error",
    "the runtime loads the opset, but does not have this operator",
    "python deploy/downgrade.py rewrites a bundle's graphs; other files: export them in an older opset",
    _TABLE,
)
NO_FORMAT = Rule(
    "format-not-supported",
    "error",
    "the runtime, or the board's GPU, does not have this number format of Q/DQ",
    "quantize by another scheme, such as int8",
    _TABLE,
)
ZERO_POINT = Rule(
    "zero-point",
    "error",
    "TensorRT quantizes symmetrically: it refuses zero points other than 0, and version 8 refuses to have none",
    "quantize to int8 with a zero point of 0, given as an input",
    "onnx/onnx-tensorrt, builtin_op_importers.cpp, release/8.5-GA lines 1193 and 1227",
)
HALF_SCALE = Rule(
    "half-precision-scale",
    "error",
    "TensorRT 8 reads scales as float32, whatever their type, and computes wrong ones",
    "store scales in float32; python deploy/downgrade.py --for tensorrt-8.6 does so for a bundle",
    "https://github.com/NVIDIA/Model-Optimizer/issues/454",
)
PRIVATE = Rule(
    "private-domain",
    "warning",
    "an operator outside of ONNX's own domain runs in the runtime that defines it only",
    "export with standard operators; quantize with QuantizeLinear and DequantizeLinear",
    "https://github.com/onnx/onnx/blob/main/docs/Versioning.md",
)
DYNAMIC = Rule(
    "dynamic-shape",
    "warning",
    "TensorRT needs a range for every size that is not fixed, and builds slower kernels for several such sizes",
    "fix all sizes of the input but the batch",
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-dynamic-shapes.html",
)
DATA_DEPENDENT = Rule(
    "data-dependent-shape",
    "warning",
    "the size of this result depends on values: neither TensorRT's profiles nor CUDA graphs cover it",
    "remove it from the graph, or compute it outside",
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-dynamic-shapes.html",
)
_DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "Loop", "Scan", "If")
_STANDARD = ("", "ai.onnx")


def check_versions(subject: Subject) -> Iterator[Finding]:
    """Checks opset, IR version, operators and number formats against the runtime."""
    runtime, model = subject.runtime, subject.model
    if runtime is None:
        return
    opset = model.opset_imports.get("", 0)
    if opset > runtime.opset:
        yield found(TOO_NEW, subject.path.name, f"opset {opset}; {runtime} loads up to {runtime.opset}")
    if runtime.ir is not None and model.ir_version > runtime.ir:
        yield found(TOO_NEW, subject.path.name, f"IR version {model.ir_version}; {runtime} loads up to {runtime.ir}")
    for node in model.graph:
        if node.domain in _STANDARD:
            yield from _check_operator(node, runtime, opset)


def _check_operator(node: ir.Node, runtime: LoadedBy, opset: int) -> Iterator[Finding]:
    try:
        since = onnx.defs.get_schema(node.op_type, max(opset, 1)).since_version
    except onnx.defs.SchemaError:
        return
    if runtime.lacks(node.op_type, since):
        yield found(NO_OPERATOR, node, f"{node.op_type} of opset {since}; {runtime} does not have it")
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    dtype = dtype_of(integers) if integers is not None else None
    if dtype is not None and dtype != ir.DataType.INT32 and not runtime.has_format(dtype.name):
        yield found(NO_FORMAT, node, f"{dtype.name} in {runtime}")
    if runtime.runtime == "tensorrt":
        yield from _check_tensorrt(node, runtime)


def _check_tensorrt(node: ir.Node, runtime: LoadedBy) -> Iterator[Finding]:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None and runtime.weakly_typed:
        yield found(ZERO_POINT, node, "no zero point")
    elif zero is not None and is_constant(zero) and array(zero).astype(np.float32).any():
        yield found(ZERO_POINT, node, "a zero point other than 0")
    scale = node.inputs[1]
    if runtime.weakly_typed and scale is not None and dtype_of(scale) not in (ir.DataType.FLOAT, None):
        yield found(HALF_SCALE, node, f"a scale in {dtype_of(scale)}")


def check_domains(subject: Subject) -> Iterator[Finding]:
    """Checks for operators outside of ONNX's domain."""
    for node in subject.model.graph:
        if node.domain not in _STANDARD:
            kind = f"{node.domain}.{node.op_type}"
            yield found(PRIVATE, node, kind, "error" if subject.for_tensorrt else None)


def check_shapes(subject: Subject) -> Iterator[Finding]:
    """Checks for sizes that are not known when an engine is built."""
    for value in subject.model.graph.inputs:
        if value.shape is None:
            yield found(DYNAMIC, str(value.name), "an input without a shape")
        elif free := [str(size) for size in value.shape[1:] if not isinstance(size, int)]:
            yield found(DYNAMIC, str(value.name), f"{', '.join(free)} of the input {value.name} not fixed")
    for node in subject.model.graph:
        if node.op_type in _DATA_DEPENDENT:
            yield found(DATA_DEPENDENT, node, node.op_type)
