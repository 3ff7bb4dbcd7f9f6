"""Rules about what a runtime loads, by the facts in versions.yaml."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from deploy.findings.finding import Finding, Subject, found
from deploy.versions import LoadedBy, read_versions
from illama.graph.reader import array, dtype_of, is_constant

_DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "Loop", "Scan", "If")
_STANDARD = ("", "ai.onnx")
_OWN_DOMAINS = {"tensorrt": ("trt",), "onnxruntime": ("com.microsoft",)}


def check_versions(subject: Subject) -> Iterator[Finding]:
    """Checks opset, IR version, operators and number formats against the runtime."""
    runtime, model = subject.runtime, subject.model
    if runtime is None:
        return
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))  # two names of ONNX's domain
    for what, has, limit in (("opset", opset, runtime.opset), ("IR version", model.ir_version, runtime.ir)):
        if limit is not None and has > limit:
            yield found("version-too-new", subject.path.name, f"{what} {has}; {runtime} loads up to {limit}")
    for node in model.graph:
        if node.domain in _STANDARD:
            yield from _check_operator(node, runtime, opset)
        elif runtime.lacks(node.op_type, 1):
            yield found("operator-not-supported", node, f"{node.op_type}; {runtime} does not have it")


def _check_operator(node: ir.Node, runtime: LoadedBy, opset: int) -> Iterator[Finding]:
    try:
        since = onnx.defs.get_schema(node.op_type, max(opset, 1)).since_version
    except onnx.defs.SchemaError:
        yield found("operator-not-supported", node, f"{node.op_type} is not an operator of opset {opset}")
        return
    if runtime.lacks(node.op_type, since):
        yield found("operator-not-supported", node, f"{node.op_type} of opset {since}; {runtime} does not have it")
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    dtype = dtype_of(integers) if integers is not None else None
    if dtype is not None and dtype.name in _formats(runtime) and not runtime.has_format(dtype.name):
        yield found("format-not-supported", node, f"{dtype.name} in {runtime}")
    if runtime.runtime == "tensorrt":
        yield from _check_tensorrt(node, runtime)


def _formats(runtime: LoadedBy) -> set[str]:
    """Returns the number formats that are known to be in some runtime, or known not to be in TensorRT."""
    known = {each.name for table in read_versions().runtimes.values() for each in table.formats}
    return known | {"INT32"} if runtime.runtime == "tensorrt" else known


def _check_tensorrt(node: ir.Node, runtime: LoadedBy) -> Iterator[Finding]:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None and runtime.weakly_typed:
        yield found("zero-point", node, "no zero point")
    elif zero is not None and is_constant(zero) and array(zero).astype(np.float32).any():
        yield found("zero-point", node, "a zero point other than 0")
    scale = node.inputs[1]
    if runtime.weakly_typed and scale is not None and dtype_of(scale) not in (ir.DataType.FLOAT, None):
        yield found("half-precision-scale", node, f"a scale in {dtype_of(scale)}")


def check_domains(subject: Subject) -> Iterator[Finding]:
    """Checks for operators outside of ONNX's domain."""
    for node in subject.model.graph:
        own = subject.runtime is not None and node.domain in _OWN_DOMAINS.get(subject.runtime.runtime or "", ())
        if node.domain not in _STANDARD and not own:
            kind = f"{node.domain}.{node.op_type}"
            yield found("private-domain", node, kind, "error" if subject.for_tensorrt else None)


def check_shapes(subject: Subject) -> Iterator[Finding]:
    """Checks for sizes that are not known when an engine is built."""
    if subject.for_cpu:
        return
    for value in subject.model.graph.inputs:
        if value.shape is None:
            yield found("dynamic-shape", str(value.name), "an input without a shape")
        elif free := [str(size) for size in value.shape[1:] if not (isinstance(size, int) and size > 0)]:
            yield found("dynamic-shape", str(value.name), f"{', '.join(free)} of the input {value.name} not fixed")
    for node in subject.model.graph:
        if node.op_type in _DATA_DEPENDENT:
            inside = ", whose branches are not checked" if node.op_type in ("Loop", "Scan", "If") else ""
            yield found("data-dependent-shape", node, node.op_type + inside)
