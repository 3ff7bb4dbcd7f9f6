"""Add the preprocessing to the graphs of a bundle, so that they take camera frames:

python deploy/camera.py runs/ptq/int8 --frame 480x640 --out runs/camera
python deploy/camera.py runs/ptq/int8 --frame 720x1280 --out runs/camera-720
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.errors import UserError

MAX_SIDE, MAX_PIXELS = 16_384, 64_000_000  # of a frame: the graph contains matrices (image_size, side)


@dataclass(frozen=True)
class CameraOptions:
    """Write a bundle whose graphs take uint8 frames (B, H, W, C), which they resize, crop and normalize themselves.

    Attributes:
        bundle: path to a bundle that python quant/ptq.py wrote.
        frame: height x width of the frames, such as 480x640.
        channels: number of channels of the frames: 3 for RGB, 1 for grayscale.
        out: path to the new bundle.
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    frame: str = "480x640"
    channels: int = 3
    out: Path = Path("runs/camera")

    def __post_init__(self) -> None:
        height, width, channels = self.shape
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_PIXELS):
            raise UserError(
                f"--frame {self.frame}: sides must be 1 to {MAX_SIDE} pixels, and at most {MAX_PIXELS} pixels in all"
            )
        if channels not in (1, 3):
            raise UserError(f"--channels must be 1 or 3, not {channels}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a frame."""
        try:
            height, width = (int(part) for part in self.frame.split("x"))
        except ValueError as error:
            raise UserError(f"--frame must be HEIGHTxWIDTH, such as 480x640, not {self.frame!r}") from error
        return height, width, self.channels


def main(options: CameraOptions) -> None:
    # Imported here, so that --help does not wait for ONNX.
    from deploy.rewrites.camera_bundle import write_camera_bundle

    write_camera_bundle(options.bundle, options.shape, options.out)
    print(f"{options.out} takes uint8 frames (batch, {', '.join(map(str, options.shape))})")


if __name__ == "__main__":
    run_command(CameraOptions, main)
