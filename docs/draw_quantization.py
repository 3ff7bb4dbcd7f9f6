"""Draw the pictures of docs/quantization.md: python docs/draw_quantization.py

One picture for each idea, from the shipped network and calibration images: quantization-zero-point.png,
quantization-smoothing.png, quantization-rotation.png and quantization-gptq.png.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.inference import load_images
from illama.models.hooks import input_hooks
from quant.quantizers.gptq import gptq
from quant.quantizers.layers import WeightQuantizer
from quant.quantizers.observers import weight_amax
from quant.quantizers.rotation import rotate, rotate_hidden
from quant.quantizers.smoothquant import smooth
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Rotations, shipped_scheme

BLOCK = "blocks.0"  # the SwiGLU product with the widest range
BEFORE, AFTER = "#b0413e", "#2f6690"


def inputs_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Returns the inputs of a layer, (vectors, width)."""
    seen: list[Tensor] = []
    with torch.no_grad(), input_hooks(model, [layer], lambda _, inputs: seen.append(inputs[0].flatten(0, -2))):
        model(images)
    return torch.cat(seen)


def zero_point(left: Axes, right: Axes) -> None:
    """A GELU's output, and the values of 4 bits with and without a zero point."""
    values = nn.functional.gelu(torch.randn(100_000, generator=torch.Generator().manual_seed(0))).clamp(max=3).numpy()
    high, low = float(values.max()), float(values.min())
    for axis, grid, color, title in (
        (left, np.arange(-7, 8) * high / 7, BEFORE, "symmetric: nearly half of the values are never used"),
        (right, low + np.arange(16) * (high - low) / 15, AFTER, "asymmetric: all values are within the range"),
    ):
        axis.hist(values, 200, color="silver", log=True)
        for value in grid:
            axis.axvline(value, color=color, lw=1)
        axis.set(title=title, xlabel="output of GELU, and the 4-bit values", ylabel="count")


def smoothing(left: Axes, right: Axes, before: Tensor, after: Tensor) -> None:
    """The largest magnitude of every channel."""
    for axis, values, color, title in (
        (left, before, BEFORE, "before: a few channels set the step of all"),
        (right, after, AFTER, "smoothed: the weights have taken the difference"),
    ):
        largest = values.abs().amax(0).sort(descending=True).values
        axis.bar(range(len(largest)), largest / largest.median(), width=1, color=color)
        axis.set(title=title, xlabel="channels of the SwiGLU product", ylabel="largest value / median channel's")
    right.set_ylim(left.get_ylim())


def rotation(left: Axes, right: Axes, before: Tensor, after: Tensor) -> None:
    """All values, in units of their root mean square."""
    for axis, values, color, title in (
        (left, before, BEFORE, "smoothed only"),
        (right, after, AFTER, "smoothed and rotated"),
    ):
        scaled = (values / values.square().mean().sqrt()).flatten().numpy()
        axis.hist(scaled, 200, color=color, log=True)
        axis.set(title=f"{title}: range {np.ptp(scaled):.0f}, so 8-bit steps of {np.ptp(scaled) / 255:.2f}")
        axis.set(xlabel="SwiGLU product / its root mean square", ylabel="count")
    right.set_xlim(left.get_xlim())


def rounding(left: Axes, right: Axes, weight: Tensor, inputs: Tensor) -> None:
    """The error of weights of 4 bits, and of the output."""
    spec = TensorSpec("int4", "channel", calibrator="mse")
    quantizer = WeightQuantizer(spec, weight_amax(weight, spec))
    wide = inputs.double()
    found = {"nearest": quantizer(weight), "GPTQ": gptq(weight, quantizer, wide.T @ wide / len(wide))}
    parts: tuple[tuple[Axes, Callable[[Tensor], Tensor], str], ...] = (
        (left, lambda w: w, "error of the weights"),
        (right, lambda w: inputs @ w.T, "error of the layer's output"),
    )
    for axis, of, title in parts:
        exact = of(weight)
        errors = [float((of(rounded) - exact).square().sum() / exact.square().sum()) for rounded in found.values()]
        axis.bar(list(found), [100 * error for error in errors], color=[BEFORE, AFTER], width=0.6)
        axis.set(title=title, ylabel="% of the energy")


def draw(name: str, panels: Callable[..., None], *data: Any) -> None:
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.subplots(1, 2)
    panels(*axes, *data)
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / f"quantization-{name}.png", dpi=100)


def main() -> None:
    shipped = load_checkpoint(SHIPPED)
    assert shipped.preprocessing is not None
    calibration = open_data("fashion-mnist").calibration(128)
    images = torch.from_numpy(load_images(calibration, shipped.preprocessing.transform())[0])
    fc2 = f"{BLOCK}.mlp.fc2"
    smoothed, scheme = copy.deepcopy(shipped.model), shipped_scheme("int8")
    rotate(smoothed, scheme.rotate)
    before = inputs_of(smoothed, fc2, images)
    smooth(smoothed, scheme, [images])
    rotated = copy.deepcopy(smoothed)
    rotate_hidden(rotated, Rotations(hidden=32), [f"{BLOCK}.mlp"])
    after = inputs_of(smoothed, fc2, images)
    draw("zero-point", zero_point)
    draw("smoothing", smoothing, before, after)
    draw("rotation", rotation, after, inputs_of(rotated, fc2, images))
    weight = smoothed.get_submodule(f"{BLOCK}.mlp.fc1").weight.detach()
    draw("gptq", rounding, weight, inputs_of(smoothed, f"{BLOCK}.mlp.fc1", images))


if __name__ == "__main__":
    main()
