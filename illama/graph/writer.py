"""Writes ONNX files, with their weights beside them if they are large."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from illama.bundle import data_file, with_data
from illama.graph.check_graph import check_graph

EXTERNAL_ABOVE = 500_000_000  # bytes of weights; inside the file, which ends at 2^31, they take twice the memory


def has_external_data(model: ir.Model) -> bool:
    """Returns whether constants lie beside the file."""
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def save_graph(model: ir.Model, path: Path, external_above: int = EXTERNAL_ABOVE) -> None:
    """Writes an ONNX file and checks it.

    Args:
        external_above: if the weights are more than this number of bytes, or were read from external data, they are
            written to the file :func:`illama.bundle.data_file` beside it.
    """
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if has_external_data(model) or sum(tensor.nbytes for tensor in tensors) > external_above:
        ir.save(model, path, external_data=data_file(path).name)
    else:
        data_file(path).unlink(missing_ok=True)
        ir.save(model, path)
    check_graph(path)


def copy_graph(path: Path, folder: Path) -> None:
    """Copies a file and its external data into a folder."""
    for each in with_data(path):
        shutil.copyfile(each, folder / each.name)
