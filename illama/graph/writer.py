"""Writes ONNX files."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes an ONNX file and checks it."""
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)
