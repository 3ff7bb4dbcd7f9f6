"""Put the preprocessing into the graph, so that an engine takes a camera's frames:

python deploy/camera.py runs/ptq/int8 --frame 480x640 --out runs/camera && python deploy/build.py runs/camera
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import onnx
import tyro

from deploy.rewrites.preprocessing import add_preprocessing
from deploy.runtimes.temperature import copy_temperature
from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, FRAME, FUSED_ONNX, Manifest, command_line, sha256
from illama.cli import run_command
from illama.data.datasets import Preprocessing
from illama.errors import UserError
from illama.graph.reader import load_graph

MAX_SIDE, MAX_PIXELS = 16_384, 64_000_000  # of a frame: the graph holds a matrix of image_size times each side


@dataclass(frozen=True)
class CameraOptions:
    """Write a bundle whose graphs take uint8 frames (B, H, W, C) and resize, crop and normalise them themselves.

    Attributes:
        bundle: one that `python quant/ptq.py` wrote.
        frame: height x width of the frames.
        channels: 3 for RGB, 1 for grey.
        out: the new bundle's folder.
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    frame: str = "480x640"
    channels: int = 3
    out: Path = Path("runs/camera")

    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels); UserError if that is none."""
        try:
            height, width = (int(part) for part in self.frame.split("x"))
        except ValueError as error:
            raise UserError(f"--frame is HEIGHTxWIDTH, such as 480x640, not {self.frame!r}") from error
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_PIXELS):
            raise UserError(
                f"a frame has sides of 1 to {MAX_SIDE} pixels and at most {MAX_PIXELS} of them, not {self.frame}"
            )
        if self.channels not in (1, 3):
            raise UserError(f"a frame has 1 or 3 channels, not {self.channels}")
        return height, width, self.channels


def main(options: CameraOptions) -> None:
    manifest, frame = Manifest.read(options.bundle), options.shape()
    preprocessing = Preprocessing.from_dict(manifest.preprocessing)
    present = [options.bundle / name for name in (CPU_ONNX, FUSED_ONNX) if (options.bundle / name).exists()]
    if not present or FRAME in manifest.metrics:
        raise UserError(f"{options.bundle} has no graph without preprocessing: name a bundle of python quant/ptq.py")
    with write_folder(options.out) as folder:
        for source in present:
            onnx.save(add_preprocessing(load_graph(source), preprocessing, frame), folder / source.name)
            copy_temperature(source, folder / source.name)
        inputs = {str(source): sha256(source) for source in present}
        replace(
            manifest, made_by=command_line(), inputs=inputs, metrics={**manifest.metrics, FRAME: list(frame)}
        ).write(folder)
    print(f"{options.out} takes uint8 frames (batch, {', '.join(map(str, frame))})")


if __name__ == "__main__":
    run_command(CameraOptions, main)
