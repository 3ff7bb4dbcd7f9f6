"""Writes a bundle whose graphs take camera frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deploy.rewrites.add_preprocessing import add_preprocessing
from deploy.runtimes.temperature import copy_temperature
from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, command_line, sha256
from illama.errors import UserError
from illama.graph.reader import load_graph
from illama.graph.writer import save_graph
from illama.manifest import Manifest


def write_camera_bundle(bundle: Path, frame: tuple[int, int, int], out: Path) -> None:
    """Writes a copy of a bundle whose graphs do the preprocessing, in one atomic write.

    Args:
        frame: (height, width, channels) of the uint8 frames.

    Raises:
        UserError: the bundle has no graph, or its graphs do the preprocessing already.
    """
    manifest = Manifest.read(bundle)
    sources = [bundle / name for name in (CPU_ONNX, FUSED_ONNX) if (bundle / name).exists()]
    if not sources or manifest.frame or out.resolve() == bundle.resolve():
        raise UserError(
            f"{bundle} has no graph without preprocessing, or is --out too: give a bundle of python quant/ptq.py"
        )
    with write_folder(out) as folder:
        for source in sources:
            model = load_graph(source)
            add_preprocessing(model, manifest.preprocessing, frame)
            save_graph(model, folder / source.name)
            copy_temperature(source, folder / source.name)
        inputs = {str(source): sha256(source) for source in sources}
        provenance = replace(manifest.provenance, command=command_line(), inputs=inputs)
        replace(manifest, provenance=provenance, frame=frame).write(folder)
