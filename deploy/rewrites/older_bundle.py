"""Writes bundles whose graphs load in older runtimes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from deploy.rewrites.lower_opset import lower_for
from deploy.rewrites.trtexec_script import write_script
from deploy.runtimes.temperature import copy_temperature
from deploy.versions import LoadedBy, Target
from illama.atomic_write import list_folder, write_folder
from illama.bundle import CPU_ONNX, ENGINE_SCRIPT, ENGINES, FUSED_ONNX, command_line, sha256, with_data
from illama.errors import UserError
from illama.graph.reader import load_graph
from illama.graph.writer import save_graph
from illama.manifest import Manifest

GRAPHS = (CPU_ONNX, FUSED_ONNX)
_WIDE = (ir.DataType.FLOAT, ir.DataType.BFLOAT16)
# Engines and measurements of the files as they were, and a script for another runtime.
_LEFT_OUT = (ENGINES, ENGINE_SCRIPT, "fastest.json", "verified.json")


class NotForTargetError(UserError):
    """A target loads no graph of a bundle."""


def lower_graphs(folder: Path, target: Target) -> list[str]:
    """Rewrites the graphs in a bundle's folder for a target, in place, and removes those that it cannot load.

    Returns:
        A line for each graph.

    Raises:
        NotForTargetError: the target can load no graph of the bundle.
        UserError: a graph is damaged.
    """
    lines = []
    for name in (name for name in GRAPHS if (folder / name).exists()):
        runtime = target.graphs.get(name)
        if runtime is None:
            lines.append(f"{name}: as it was, not for {target.name}")
            continue
        model = load_graph(folder / name)
        try:
            lines.append(f"{name}, for {runtime}: {_lower(folder / name, model, runtime)}")
        except UserError as error:
            lines.append(f"no {name}: {error}")
            for each in with_data(folder / name):
                each.unlink()
    if not any((folder / name).exists() for name in GRAPHS):
        raise NotForTargetError(f"{target.name} loads no graph of this bundle ({'; '.join(lines)})")
    return lines


def _lower(path: Path, model: ir.Model, runtime: LoadedBy) -> str:
    """Rewrites a graph for a runtime; returns its opset and IR version as text."""
    for_tensorrt = runtime.runtime == "tensorrt"
    if for_tensorrt and model.opset_imports.get("", 0) < 19:  # it is in float32, and no longer says what must be
        raise UserError("it is for TensorRT 8 already: give the bundle that it was made from")
    wide = [str(node.name) for node in model.graph if node.outputs[0].dtype in _WIDE]
    if lower_for(model, runtime):
        with tempfile.TemporaryDirectory(dir=path.parent) as draft:  # the old file's weights are mapped to memory
            save_graph(model, Path(draft) / path.name)
            for each in with_data(Path(draft) / path.name):
                each.replace(path.parent / each.name)
    if for_tensorrt:
        write_script(path.parent, model, runtime, wide)
    return f"opset {model.opset_imports['']}, IR version {model.ir_version}"


def write_older_bundle(bundle: Path, target: Target, out: Path) -> Sequence[str]:
    """Writes a copy of a bundle whose graphs load in the target's runtimes, in one atomic write, without its engines.

    Returns:
        A line for each graph (:func:`lower_graphs`).

    Raises:
        NotForTargetError: the target can load no graph of the bundle.
        UserError: a graph is damaged, or ``out`` is the bundle or inside it.
    """
    manifest = Manifest.read(bundle)
    sources = [bundle / name for name in GRAPHS if (bundle / name).exists()]
    if not any(source.name in target.graphs for source in sources):
        raise NotForTargetError(f"{bundle} has no graph for {target.name}")
    if out.resolve().is_relative_to(bundle.resolve()):
        raise UserError(f"{out} is {bundle} or inside it: give another --out")
    with write_folder(out) as folder:
        for path in list_folder(bundle):
            if path.is_file() and path.name not in _LEFT_OUT:
                _copy(path, folder / path.name)
        lines = lower_graphs(folder, target)
        for source in sources:
            if (folder / source.name).exists():
                copy_temperature(source, folder / source.name)
        inputs = {str(each): sha256(each) for each in sources}
        replace(manifest, provenance=replace(manifest.provenance, command=command_line(), inputs=inputs)).write(folder)
    return lines


def _copy(source: Path, target: Path) -> None:
    """Copies the content of a file; raises UserError if it cannot be read, or the disk is full."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"cannot copy {source}: {error.strerror}") from error
