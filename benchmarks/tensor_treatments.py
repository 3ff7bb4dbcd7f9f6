"""Compares calibrators and SmoothQuant strengths for each kind of tensor:

python benchmarks/tensor_treatments.py --checkpoint illama/weights/nano-fashion-mnist --data fashion-mnist

Each row quantizes one kind of tensor (or a whole scheme) and compares the logits with the float network's: SQNR in dB,
mean KL divergence of the predicted distributions, and numbers of images whose class becomes wrong or correct.
Calibration and test images are disjoint parts of the training split. The distributions that explain the results are
plotted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from illama.cli import run_command
from eval.report.store import write_results
from illama.bundle import SHIPPED
from illama.inference import load_images
from illama.models.attention import MaskedNetwork
from illama.options import SourceOptions
from quant.inputs import open_inputs
from quant.mixed_precision.layer_effects import Tally
from quant.quantizers.calibrate import calibrate
from quant.quantizers.smoothquant import smooth
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Scheme, resolve, shipped_scheme

KINDS = {
    "weights": "*.weight",
    "input of qkv": "*.qkv.input",
    "q": "*.core.q",
    "k": "*.core.k",
    "v": "*.core.v",
    "softmax output p": "*.core.p",
    "input of proj": "*.proj.input",
    "input of fc1, fc3": "*.fc[13].input",
    "SwiGLU product": "*.fc2.input",
    "input of head": "head.input",
}
PRODUCT = "*.fc2"


@dataclass(frozen=True)
class Options:
    """Compare calibrators and SmoothQuant strengths for each kind of tensor.

    Attributes:
        checkpoint: path to a trained iLLaMA.
        data: its data set.
        calibration_images: number of calibration images, of the training split.
        images: number of images to compare on, of the training split.
        out: folder of the results.
    """

    checkpoint: Path = SHIPPED
    data: str = "fashion-mnist"
    calibration_images: int = 256
    images: int = 1000
    out: Path = Path("results/tensor-treatments")


def treatments() -> Iterator[tuple[str, str, Scheme]]:
    """Yields (what is quantized, how, scheme) for each row of the table."""
    for kind, pattern in KINDS.items():
        for name, spec in _specs(kind).items():
            yield kind, name, Scheme("one", {pattern: spec})
    int8 = shipped_scheme("int8")
    for strength in (0.3, 0.5, 0.7, 0.85, 1.0):
        scheme = Scheme("one", {"*.fc2.*": TensorSpec("int8"), "*.fc2.weight": TensorSpec("int8", "channel")})
        yield "SwiGLU product and its weight", f"smoothed {strength}", replace(scheme, smooth={PRODUCT: strength})
    bare = replace(int8, smooth={})
    symmetric = replace(bare, tensors={**bare.tensors, **_inputs(TensorSpec("int8"))})
    yield "int8", "symmetric inputs, nothing smoothed", symmetric
    for calibrator in ("percentile", "entropy", "mse"):
        spec = TensorSpec("int8", calibrator=calibrator)  # type: ignore[arg-type]
        yield (
            "int8",
            f"the same, {calibrator} for every input",
            replace(bare, tensors={**bare.tensors, **_inputs(spec)}),
        )
    yield "int8", "symmetric inputs", replace(symmetric, smooth=int8.smooth)
    yield "int8", "nothing smoothed", bare
    for name in ("int8", "int8-accurate", "int8-attention", "fp8", "fp8-attention"):
        yield name, "as shipped", shipped_scheme(name)


def _inputs(spec: TensorSpec) -> dict[str, TensorSpec | None]:
    return {"*.input": spec, "*patch_embed.*.input": None}


def _specs(kind: str) -> dict[str, TensorSpec]:
    if kind == "weights":
        ranges = {name: TensorSpec("int8", "channel", calibrator=name) for name in ("max", "mse")}  # type: ignore[arg-type]
        return {**ranges, "max, one scale a tensor": TensorSpec("int8")}
    own = "uint8" if kind.startswith("softmax") else "int8"
    names = ("max", "percentile", "entropy", "mse")
    specs = {name: TensorSpec(own, calibrator=name) for name in names}  # type: ignore[arg-type]
    if own == "uint8":
        return {**specs, "range 0..1": TensorSpec("uint8", amax=1.0), "int8, max": TensorSpec("int8")}
    return {**specs, "asymmetric": TensorSpec("uint8", symmetric=False)}


def measure(model: MaskedNetwork, batches: list[Tensor], images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Returns a row for each treatment."""
    parts = list(zip(images.split(64), labels.split(64), strict=True))
    with torch.inference_mode():
        reference = [model(part) for part, _ in parts]
    rows = []
    for tensor, treatment, scheme in tqdm(list(treatments()), unit="treatment", disable=None):
        quantized, tally = calibrate(model, resolve(scheme, model), batches), Tally()
        with torch.inference_mode():
            for logits, (part, expected) in zip(reference, parts, strict=True):
                tally.add(logits, quantized(part), expected)
        rows.append({"tensor": tensor, "treatment": treatment, **asdict(tally.effect())})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| quantized | how | logits SQNR, dB | KL divergence | images lost, gained |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['tensor']} | {row['treatment']} | {row['sqnr_db']:.1f} | {row['kl']:.1e} | "
            f"{row['lost']}, {row['gained']} |"
        )
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def observe_inputs(model: nn.Module, names: Mapping[str, str], images: Tensor) -> dict[str, Tensor]:
    """Returns title -> input of the module of that name, for all images."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, title=title: seen.__setitem__(title, x[0]))
        for title, name in names.items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


def draw(model: MaskedNetwork, batches: list[Tensor], path: Path) -> None:
    """Plots histograms of two tensors with outliers, and the channels' ranges before and after smoothing."""
    model.set_attention_form("plain")
    smoothed = calibrate(model, resolve(Scheme("none"), model), batches)
    smooth(smoothed, shipped_scheme("int8"), batches)
    product = f"{max(index for index in range(64) if f'blocks.{index}.mlp.fc2' in dict(model.named_modules())) // 2}"
    names = {"p": "blocks.0.attn.core.p", "product": f"blocks.{product}.mlp.fc2"}
    before, after = (observe_inputs(network, names, batches[0]) for network in (model, smoothed))
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    p_axes, product_axes, channel_axes = figure.subplots(1, 3)
    p = before["p"].flatten().numpy()
    p_axes.hist(p[p > 0], bins=120, log=True, color="C0")
    share = 100 * float(np.mean(p == 0))
    p_axes.set(
        title=f"softmax output after the mask, block 0\n{share:.0f}% are exactly 0 (not drawn)",
        xlabel="value",
        ylabel="values",
    )
    for label, seen in (("as trained", before), ("fc3 smoothed", after)):
        values = (seen["product"] / seen["product"].abs().max()).flatten().numpy()
        product_axes.hist(values, bins=121, range=(-1, 1), log=True, histtype="step", label=label)
        channel_axes.plot(
            np.sort((seen["product"].abs().amax((0, 1)) / seen["product"].abs().max()).numpy())[::-1], label=label
        )
    product_axes.set(title=f"SwiGLU product, block {product}", xlabel="share of the largest magnitude")
    channel_axes.set(
        title=f"SwiGLU product, block {product}",
        xlabel="channel, by range",
        yscale="log",
        ylabel="range, share of the largest",
    )
    for axes in (product_axes, channel_axes):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    inputs = open_inputs(SourceOptions(options.checkpoint, data=options.data))
    model, data, preprocessing = inputs.model, inputs.data, inputs.preprocessing
    both = data.calibration(options.calibration_images + options.images)
    pixels, classes = (torch.from_numpy(array) for array in load_images(both, preprocessing.transform()))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    first, others = order.split([options.calibration_images, options.images])
    batches = list(pixels[first].split(64))
    rows = measure(model, batches, pixels[others], classes[others])
    name = options.checkpoint.resolve().name
    facts = {"checkpoint": name, "calibration_images": options.calibration_images, "images": options.images}
    write_results(options.out, name, {**facts, "rows": rows}, table(rows))
    draw(model, batches, options.out / f"{name}.png")


if __name__ == "__main__":
    run_command(Options, main)
