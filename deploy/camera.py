"""Put the preprocessing into the graph, so that an engine takes a camera's frames:

python deploy/camera.py runs/ptq/int8 --frame 480x640 --out runs/camera && python deploy/build.py runs/camera
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
import tyro
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploy.graph import load_graph
from illama.bundle import CPU_ONNX, FRAME, FUSED_ONNX, Manifest, command_line, sha256, write_folder
from illama.data import Preprocessing
from illama.errors import UserError, run_command

Step = tuple[str, list[str], dict[str, Any]]  # operator, constants, attributes
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R BT.601, in the fractions that Pillow computes with


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
        if height < 1 or width < 1 or self.channels not in (1, 3):
            raise UserError(f"a frame is 1x1 or more, of 1 or 3 channels, not {self.frame} of {self.channels}")
        return height, width, self.channels


def add_preprocessing(model: ModelProto, preprocessing: Preprocessing, frame: tuple[int, int, int]) -> ModelProto:
    """A graph that takes frames (B, height, width, channels), uint8, in place of the network's input.

        before   images (B, C, S, S) float32 -> ...
        after    images (B, H, W, c) uint8 -> Cast -> Transpose -> MatMul (columns) -> Round -> Clip
                 -> MatMul (rows) -> Round -> Clip [-> MatMul (to grey) -> Round] -> Mul -> Add -> ...

    A resize of a fixed size is a matrix for each axis, and a crop leaves rows of it out, so that no runtime's own idea
    of bicubic or antialiasing comes in. Rounded between the passes like Pillow's, which the network's accuracy was
    measured with: pixels differ from Pillow's by one level at most, where it rounds in fixed point.
    """
    model = copy.deepcopy(model)
    graph, image = model.graph, model.graph.input[0]
    height, width, channels = frame
    rows, columns = _resize_and_crop(height, width, preprocessing)
    constants = {"columns": columns.T, "rows": rows, "low": np.float32(0), "high": np.float32(255)}
    mean, std = (np.array(values, dtype=np.float32).reshape(-1, 1, 1) for values in
                 (preprocessing.mean, preprocessing.std))  # fmt: skip
    constants |= {"scale": 1 / (255 * std), "shift": -mean / std}
    round_and_clip: list[Step] = [("Round", [], {}), ("Clip", ["low", "high"], {})]
    steps: list[Step] = [
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
        ("MatMul", ["columns"], {}),
        *round_and_clip,
        ("Rows", ["rows"], {}),
        *round_and_clip,
    ]
    if channels != preprocessing.in_channels:
        constants["colors"] = _color_weights(channels)
        steps += [("Conv", ["colors"], {}), ("Round", [], {})]
    steps += [("Mul", ["scale"], {}), ("Add", ["shift"], {})]
    nodes, value = [], image.name
    for index, (kind, extra, attributes) in enumerate(steps):
        result = f"preprocess.{index}" if index < len(steps) - 1 else "preprocessed"
        inputs = [value, *(f"preprocess.{name}" for name in extra)]
        if kind == "Rows":  # the matrix stands on the left here
            kind, inputs = "MatMul", inputs[::-1]
        nodes.append(helper.make_node(kind, inputs, [result], name=f"preprocess/{kind}_{index}", **attributes))
        value = result
    for node in graph.node:
        node.input[:] = ["preprocessed" if name == image.name else name for name in node.input]
    batch = image.type.tensor_type.shape.dim[0].dim_param
    image.CopyFrom(helper.make_tensor_value_info(image.name, TensorProto.UINT8, [batch, height, width, channels]))
    graph.initializer.extend(numpy_helper.from_array(np.asarray(values, dtype=np.float32), f"preprocess.{name}")
                             for name, values in constants.items())  # fmt: skip
    rest = [copy.deepcopy(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    onnx.checker.check_model(model, full_check=True)
    return model


def _resize_and_crop(height: int, width: int, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of both axes, (image_size, height) and (image_size, width), as torchvision resizes and crops."""
    size, short = preprocessing.image_size, preprocessing.resize
    if short is None:
        return _bicubic(height, size), _bicubic(width, size)
    longer = int(short * max(height, width) / min(height, width))
    sides = (short, longer) if height <= width else (longer, short)
    matrices = []
    for old, new in zip((height, width), sides, strict=True):
        first = round((new - size) / 2)
        matrices.append(_bicubic(old, new)[first : first + size])
    return matrices[0], matrices[1]


def _bicubic(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) of an antialiased bicubic resize of one axis."""
    if old == new:
        return np.eye(old, dtype=np.float32)
    unit = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(unit, size=(new, old), mode="bicubic", antialias=True)[0, 0].float().numpy()


def _color_weights(channels: int) -> np.ndarray:
    """A 1x1 convolution from RGB to grey, or from grey to RGB."""
    weights = np.array(LUMA)[None, :] if channels == 3 else np.ones((3, 1))
    return weights[:, :, None, None].astype(np.float32)


def main(options: CameraOptions) -> None:
    manifest, frame = Manifest.read(options.bundle), options.shape()
    preprocessing = Preprocessing(**manifest.preprocessing)
    present = [options.bundle / name for name in (CPU_ONNX, FUSED_ONNX) if (options.bundle / name).exists()]
    if not present or FRAME in manifest.metrics:
        raise UserError(f"{options.bundle} has no graph without preprocessing: name a bundle of python quant/ptq.py")
    with write_folder(options.out) as folder:
        for source in present:
            onnx.save(add_preprocessing(load_graph(source), preprocessing, frame), folder / source.name)
        inputs = {str(source): sha256(source) for source in present}
        replace(
            manifest, made_by=command_line(), inputs=inputs, metrics={**manifest.metrics, FRAME: list(frame)}
        ).write(folder)
    print(f"{options.out} takes uint8 frames (batch, {', '.join(map(str, frame))})")


if __name__ == "__main__":
    run_command(CameraOptions, main)
