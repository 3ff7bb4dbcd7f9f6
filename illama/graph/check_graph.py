"""The check that every ONNX file passes before it is read, or before a runtime opens it.

A file that lies about its sizes, or a node without outputs, can end a runtime's process or take all memory. A file is
accepted if it has one input and no control flow, is valid for ONNX's checker, and its tensors are as large as it says.
"""

from __future__ import annotations

import math
import stat
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto

from illama.bundle import data_file
from illama.errors import UserError
from illama.graph.tensorrt_operators import register_operators

MAX_ELEMENTS = 2**28  # of one value for one image: a gigabyte in float32; a dense map of ADE20K has a seventh of it
_MAX_FILE = 2**31 - 1  # bytes of a protobuf message
_SMALL = 1024  # bytes; type inference needs the values of small constants only, such as shapes
_Stamp = tuple[int, int, int]


def check_graph(path: Path) -> tuple[ValueInfoProto, ...]:
    """Checks an ONNX file, and its external data; returns the dtypes and shapes of its values.

    A process checks a file again only if it has changed.

    Raises:
        UserError: the file is missing or damaged, or is not a network that this toolkit can run.
    """
    try:
        stamps = _stamp(path), _stamp(data_file(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise UserError(f"{path} cannot be read: {error}") from error
    if stamps[0] is None:
        raise UserError(f"{path.parent} has no {path.name}: make it with python quant/ptq.py")
    try:
        return _check(path.absolute(), *stamps)
    except _RejectedError as error:
        raise UserError(f"{path} {error}") from error


class _RejectedError(Exception):
    """What is wrong with a file; follows its path in the message."""


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else -1, found.st_mtime_ns, found.st_ino


@lru_cache(maxsize=64)
def _check(path: Path, file: _Stamp, data: _Stamp | None) -> tuple[ValueInfoProto, ...]:
    if not 0 < file[0] <= _MAX_FILE:
        raise _RejectedError("is not an ONNX file: it is empty, larger than 2 GB, or not a regular file")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
        _check_structure(model)
        for tensor in _tensors(model):
            _check_tensor(tensor, path, data)
        register_operators()
        onnx.checker.check_model(path)
        drop_large_constants(model)
        inferred = _inferred(model)
        _set_batch(model.graph)
        one = _inferred(model)
    except _RejectedError:
        raise
    except Exception as error:  # the exceptions of protobuf, onnx and onnx_ir have no other common base class
        raise _RejectedError(f"is not a valid ONNX file: {' '.join(str(error).split())[:200]}") from error
    empty = {name for node in model.graph.node if node.op_type == "Split" for name in node.output}  # part of 0 tokens
    values = (*one.input, *one.value_info, *one.output)
    known = {value.name: sizes for value in values if (sizes := _sizes(value)) is not None}
    names = (one.input[0].name, *(name for node in one.node for name in node.output if name))
    if lost := next((name for name in names if name not in known), None):
        raise _RejectedError(f"has {lost[:80]!r}, whose shape cannot be inferred")
    for name, sizes in known.items():
        count, least = math.prod(sizes), 0 if name in empty else 1
        if count > MAX_ELEMENTS or (len(sizes) > 1 and count < least) or min((*sizes, 0)) < 0:
            raise _RejectedError(f"computes {name[:80]!r}, empty or with over {MAX_ELEMENTS} elements for an image")
    return tuple(inferred.value_info)


def _set_batch(graph: GraphProto) -> None:
    """Makes it a graph for one image: without a number, the -1 of a Reshape cannot be inferred."""
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.value_info, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if batch and size.dim_param == batch:
                size.dim_value = 1


def _inferred(model: ModelProto) -> GraphProto:
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph


def _sizes(value: ValueInfoProto) -> list[int] | None:
    """Returns the sizes of a value; None if one of them is not known."""
    shape = value.type.tensor_type.shape
    known = value.type.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in shape.dim)
    return [size.dim_value for size in shape.dim] if known else None


def _check_structure(model: ModelProto) -> None:
    graph = model.graph
    if model.functions or graph.sparse_initializer or model.training_info:
        raise _RejectedError("has functions, sparse constants or training information: export it without")
    if len(graph.input) != 1 or not graph.output:
        raise _RejectedError(f"has {len(graph.input)} inputs and {len(graph.output)} outputs: it must have one input")
    images = graph.input[0].type.tensor_type
    if images.elem_type not in (TensorProto.FLOAT, TensorProto.UINT8) or len(images.shape.dim) < 2:
        raise _RejectedError("has an input that is not a float32 or uint8 tensor with a shape")
    for node in graph.node:
        if not any(node.output):
            raise _RejectedError(f"has a node without outputs, {node.name[:80]!r} ({node.op_type[:80]})")
        counts = [each.i for each in node.attribute if each.name == "num_outputs"] if node.op_type == "Split" else []
        if any(count != len(node.output) for count in counts):  # ends the process inside onnx's type inference
            raise _RejectedError(f"has a Split whose num_outputs is not its number of outputs, {node.name[:80]!r}")
        if any(each.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for each in node.attribute):
            raise _RejectedError(f"has control flow, {node.name[:80]!r} ({node.op_type[:80]}): export it without")
    for kind, names in (("nodes", graph.node), ("constants", graph.initializer)):
        for name, count in Counter(each.name for each in names if each.name).most_common(1):
            if count > 1:
                raise _RejectedError(f"has {count} {kind} of the name {name[:80]!r}")


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors)


def _check_tensor(tensor: TensorProto, path: Path, data: _Stamp | None) -> None:
    """Checks that a tensor holds as many bytes as its shape and dtype say, in the file or in its external data."""
    count, bits = math.prod(tensor.dims), ir.DataType(tensor.data_type).bitwidth
    size, name = math.ceil(count * bits / 8), tensor.name[:80]
    if tensor.data_location == TensorProto.EXTERNAL:
        where = {entry.key: entry.value for entry in tensor.external_data}
        file = data_file(path)
        if where.get("location") != file.name or file.is_symlink():
            raise _RejectedError(f"has external data outside {file.name} ({name!r}): save all of it there")
        offset, held = int(where.get("offset", 0)), int(where.get("length", size))
        if data is None or offset < 0 or offset + held > data[0]:
            raise _RejectedError(f"has external data that {file.name} does not contain ({name!r})")
    elif tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
    else:
        fields = tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data
        size, held = math.ceil(count / max(1, 8 // bits)), sum(len(field) for field in fields)
    if min((*tensor.dims, 0)) < 0 or held != size:
        raise _RejectedError(f"has a constant {name!r} that is not as large as its shape says")


def drop_large_constants(model: ModelProto) -> None:
    """Removes the values of large constants, which type inference does not read."""
    for tensor in model.graph.initializer:
        if tensor.ByteSize() > _SMALL:
            tensor.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
