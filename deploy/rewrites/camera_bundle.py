"""Writes a bundle whose graphs take camera frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.rewrites.add_preprocessing import add_preprocessing
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.temperature import copy_temperature
from deploy.runtimes.verification import find_golden
from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, GOLDEN, command_line, sha256
from illama.errors import UserError
from illama.golden_answers import GoldenAnswers
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
        if (golden := _golden_of_frames(bundle, sources[0], frame)) is not None:
            golden.write(folder)
        inputs = {str(source): sha256(source) for source in sources}
        provenance = replace(manifest.provenance, command=command_line(), inputs=inputs)
        replace(manifest, provenance=provenance, frame=frame).write(folder)


def _golden_of_frames(bundle: Path, source: Path, frame: tuple[int, int, int]) -> GoldenAnswers | None:
    """Returns golden answers whose images have the frame's size, or None if the bundle has none.

    Pillow resizes and crops them, and the bundle's own graph, verified before, computes their logits.
    """
    if find_golden(source) is None:
        return None
    golden, (height, width, channels) = GoldenAnswers.read(bundle / GOLDEN), frame
    images = golden.images if golden.images.shape[-1] == channels else golden.images[..., :1].repeat(channels, axis=-1)
    answers = replace(golden, images=images, facts=replace(golden.facts, size=(height, width), mean=(), std=()))
    to_array = Manifest.read(bundle).preprocessing.to_array
    frames = answers.inputs(len(images))
    inputs = np.stack([to_array(Image.fromarray(each if channels == 3 else each[..., 0])) for each in frames])
    logits = open_engine(source, "onnxruntime").infer(inputs).reshape(len(inputs), -1)
    return replace(answers, logits=np.ascontiguousarray(logits[:, golden.positions]))
