"""The command of TensorRT's own tool that builds an engine on a board without Python: trtexec.sh in a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from deploy.versions import LoadedBy
from illama.bundle import ENGINE_SCRIPT, FUSED_ONNX, INPUT
from illama.errors import UserError

_NAME = re.compile(r"[\w./-]+", re.ASCII)  # trtexec separates names by , and : and a shell reads them, too
_SCRIPT = """#!/bin/sh
# Builds model.engine from {graph}, with the trtexec of TensorRT {version}, in the folder of this file.
# Usage: sh {name} [LARGEST_BATCH]
set -e
cd "$(dirname "$0")"
PATH=$PATH:/usr/src/tensorrt/bin
trtexec --onnx={graph} --saveEngine=model.engine {options} \\
    --minShapes={input}:1x{shape} --optShapes={input}:1x{shape} --maxShapes={input}:${{1:-8}}x{shape}
"""


def write_script(folder: Path, model: ir.Model, runtime: LoadedBy, wide: Sequence[str]) -> None:
    """Writes the script for a graph and a TensorRT.

    From version 10 on, the graph says in which precision each operator runs. TensorRT 8 chooses it, and must be told
    which operators need float32: normalizations, whose squares overflow in half precision, and what was exported in a
    wider format.

    Raises:
        UserError: such an operator has a name with other characters than letters, digits and ._/-.

    Args:
        wide: names of the operators that did not run in half precision before the graph was rewritten.
    """
    images = model.graph.inputs[0]
    assert images.shape is not None
    only = "--skipInference" if runtime.at_least("8.6") else "--buildOnly"
    if runtime.weakly_typed:
        names = [str(node.name) for node in model.graph if _came_from(str(node.name), wide)]
        if odd := next((name for name in names if not _NAME.fullmatch(name)), None):
            raise UserError(f"the operator {odd[:80]!r} has a name that trtexec cannot take: export the network again")
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph)
        options = ["--fp16", *(["--int8"] if quantized else []), only]
        options += ["--precisionConstraints=obey", f"--layerPrecisions={','.join(f'{name}:fp32' for name in names)}"]
    else:
        options = ["--stronglyTyped", only]
    text = _SCRIPT.format(
        graph=FUSED_ONNX,
        version=runtime.version,
        name=ENGINE_SCRIPT,
        options=" ".join(options),
        input=INPUT,
        shape="x".join(map(str, images.shape[1:])),
    )
    (folder / ENGINE_SCRIPT).write_text(text)


def _came_from(name: str, originals: Sequence[str]) -> bool:
    """Whether an operator is one of those named, or a part of one."""
    return any(name == each or name.startswith(f"{each}/") for each in originals)
