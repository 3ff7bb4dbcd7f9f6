"""Measures time and memory of post-training quantization: python benchmarks/ptq_cost.py

    python benchmarks/ptq_cost.py --models tiny small base large --sizes 224 384 --schemes int8 --images 64

It measures the way from a checkpoint and 256 JPEG files to an ONNX graph, phase by phase, in a new process for each
network and scheme. The networks are iLLaMAs with random weights: the cost does not depend on them. The limits for
`int8` of the first one on two cores are 60 s and 4 GiB. A second table has the growth from the first network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from PIL import Image
from tqdm import tqdm

from illama.cli import run_command
from eval.measure.machine import peak_memory_gib
from eval.report.store import write_results
from illama import ILLaMA, ModelConfig
from illama.checkpoints.load import load_checkpoint, write_weights
from illama.data.datasets import open_data
from illama.errors import UserError
from illama.inference import load_images
from quant.export import onnx_export
from quant.inputs import split_images
from quant.quantizers import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

MARK = {"seconds": 60.0, "peak_memory_gib": 4.0}
MARKED = "int8"
# In chronological order; the time of a phase does not include the phases inside it.
PHASES = (
    "imports",
    "load checkpoint",
    "read images",
    "rotate and smooth",
    "calibrate",
    "GPTQ",
    "learn rounding",
    "torch.export",
    "translate",
    "optimize",
    "check",
    "rest of export",
)


@dataclass(frozen=True)
class CostOptions:
    """Measure time and memory of post-training quantization, phase by phase.

    Attributes:
        schemes: names of schemes for ONNX; python quant/list_schemes.py lists them.
        checkpoint: path to a checkpoint, instead of iLLaMAs with random weights and 1000 classes.
        models: of tiny, small, base and large.
        sizes: image sizes in pixels.
        images: number of calibration images: upscaled Fashion-MNIST with noise, 500 x 375 pixels as common in ImageNet.
        fused: also write TensorRT's graph, in half precision.
        threads: number of PyTorch's threads.
        out: folder of the results.
    """

    schemes: tuple[str, ...] = ("int8", "fp8", "w4a8")
    checkpoint: Path | None = None
    models: tuple[str, ...] = ("tiny",)
    sizes: tuple[int, ...] = (224,)
    images: int = 256
    fused: bool = False
    threads: int = 2
    out: Path = Path("results/ptq-cost")

    @property
    def result(self) -> str:
        """Name of the results files."""
        name = "networks" if len(self.networks) > 1 else next(iter(self.networks))
        return name + ("-fused" if self.fused else "")

    @property
    def networks(self) -> dict[str, ModelConfig | Path]:
        """Name -> config, or path of the checkpoint."""
        if self.checkpoint is not None:
            return {self.checkpoint.stem: self.checkpoint}
        return {
            model if size == 224 else f"{model}-{size}": ModelConfig.preset(model, num_classes=1000, image_size=size)
            for size in self.sizes
            for model in self.models
        }


@dataclass
class Clock:
    """Measures the seconds of each phase, without the phases inside it."""

    seconds: dict[str, float] = field(default_factory=dict)
    inner: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        self.inner.append(0.0)
        try:
            yield
        finally:
            took = time.monotonic() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self.inner.pop()
            self.inner[-1] += took

    def timed(self, name: str, function: Any) -> Any:
        """Returns ``function`` timed as a phase."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **keywords)

        return run


def measure(scheme: str, checkpoint: str, folder: str, images: int, fused: bool, started: float) -> dict[str, Any]:
    """Quantizes and exports in this process; returns the seconds of each phase, and the peak memory in GiB.

    Args:
        folder: folder of the images, and of the new graphs.
        started: time.monotonic() at the start of this process.
    """
    clock = Clock({"imports": time.monotonic() - started})
    with clock.phase("load checkpoint"):
        model = load_checkpoint(Path(checkpoint)).model
    with clock.phase("read images"):
        data, config = open_data(folder), model.config
        transform = data.preprocessing(config.image_size, config.in_channels).transform()
        pixels, _ = load_images(data.calibration(images), transform)
    inside = [
        (calibrate, "prepare", "rotate and smooth"),
        (calibrate, "round_weights", "GPTQ"),
        (calibrate, "reconstruct", "learn rounding"),
        (torch.export, "export", "torch.export"),
        (torch.onnx, "export", "translate"),
        (onnx_export, "simplify", "optimize"),
        (onnx.checker, "check_model", "check"),
    ]
    with ExitStack() as patches:
        for module, function, name in inside:
            patches.enter_context(mock.patch.object(module, function, clock.timed(name, getattr(module, function))))
        with clock.phase("calibrate"):
            quantized = calibrate.calibrate(
                model, resolve(shipped_scheme(scheme), model), split_images(torch.from_numpy(pixels))
            )
        with clock.phase("rest of export"):
            onnx_export.export_onnx(quantized, Path(folder) / "model.onnx", "plain")
            if fused:
                onnx_export.export_onnx(quantized, Path(folder) / "model.fused.onnx", "fused", torch.float16)
    facts = {"parameters": sum(each.numel() for each in model.parameters()), "tokens": config.patches + 1}
    return {"phases": clock.seconds, "peak_memory_gib": peak_memory_gib(), **facts}


def prepare(options: CostOptions, folder: Path) -> None:
    """Writes the images of the measurements, in ImageNet's layout."""
    generator = np.random.default_rng(0)
    pictures = open_data("fashion-mnist").test()
    for split, count in (("train", options.images), ("val", 2)):
        for index in range(count):
            path = folder / split / f"class{index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            gray = Image.fromarray(np.asarray(pictures[index][0])[0]).resize((500, 375), Image.Resampling.BICUBIC)
            noise = generator.normal(0, 12, (375, 500, 3))
            pixels = np.asarray(gray.convert("RGB")) + noise
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_checkpoint(network: ModelConfig | Path, folder: Path) -> Path:
    """Writes an iLLaMA with random weights, unless the network is a checkpoint already; returns its path."""
    if isinstance(network, Path):
        return network
    torch.manual_seed(0)
    write_weights(ILLaMA(network).state_dict(), network, folder / "model.safetensors")
    return folder / "model.safetensors"


def measure_apart(options: CostOptions, scheme: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Measures one scheme in a new process: phases in seconds, CPU seconds and peak memory in GiB.

    Raises:
        UserError: the process failed; the message has its last error line.
    """
    start = time.monotonic()
    arguments = {
        "scheme": scheme,
        "checkpoint": str(checkpoint),
        "folder": str(folder),
        "images": options.images,
        "fused": options.fused,
        "started": start,
    }
    program = "import json, sys, ptq_cost; print(json.dumps(ptq_cost.measure(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    paths = os.pathsep.join(map(str, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": paths}
    with (folder / "out.txt").open("wb") as out, (folder / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # getrusage would include earlier children
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    if process.returncode:
        words = (folder / "errors.txt").read_text().strip() or f"exit status {process.returncode}"
        raise UserError(f"measuring {scheme} failed: {words.splitlines()[-1]}")
    found = json.loads((folder / "out.txt").read_text().splitlines()[-1])
    phases = found["phases"]
    learning = phases.get("learn rounding", 0.0)
    return {
        "scheme": scheme,
        "phases": {name: round(phases[name], 2) for name in PHASES if name in phases},
        "seconds": round(seconds, 1),
        "seconds_without_learning": round(seconds - learning, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_gib": round(found["peak_memory_gib"], 2),
        "parameters": found["parameters"],
        "tokens": found["tokens"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a row per scheme and a column per phase, and whether int8 is within its limits."""
    columns = [name for name in PHASES if any(name in row["phases"] for row in rows)]
    lines = ["| network | scheme | " + " | ".join(columns) + " | all, s | without learning, s | CPU s | peak GiB |"]
    lines.append("|---" * (len(columns) + 6) + "|")
    for row in rows:
        phases = [f"{row['phases'][name]:.1f}" if name in row["phases"] else "-" for name in columns]
        ends = [str(row[k]) for k in ("seconds", "seconds_without_learning", "cpu_seconds", "peak_memory_gib")]
        lines.append(f"| {row['network']} | {row['scheme']} | " + " | ".join([*phases, *ends]) + " |")
    marked = [row for row in rows if row["scheme"] == MARKED]
    lines += [
        f"\nThe mark, {MARK['seconds']:.0f} s and {MARK['peak_memory_gib']:.0f} GiB, is {mark_verdict(row)}."
        for row in marked[:1]
    ]
    return "\n".join([*lines, *growth(rows)]) + "\n"


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a table of how much more each network costs than the first one, in the same scheme."""
    first = {row["scheme"]: row for row in reversed(rows)}
    others = [row for row in rows if row["network"] != first[row["scheme"]]["network"]]
    if not others:
        return []
    lines = ["", "| network | scheme | parameters | tokens | seconds | GiB | GiB over its float32 weights |"]
    lines.append("|---" * 7 + "|")
    for row in others:
        names = ("parameters", "tokens", "seconds", "peak_memory_gib")
        times = [f"{row[name] / first[row['scheme']][name]:.1f} times" for name in names]
        weights = row["peak_memory_gib"] * 2**28 / row["parameters"]
        lines.append(f"| {row['network']} | {row['scheme']} | {' | '.join(times)} | {weights:.1f} times |")
    return lines


def mark_verdict(row: dict[str, Any]) -> str:
    return "met" if all(row[name] <= limit for name, limit in MARK.items()) else "missed"


def main(options: CostOptions) -> None:
    if wrong := [name for name in options.schemes if shipped_scheme(name).backend != "onnx"]:
        raise UserError(f"scheme {wrong[0]} is not for ONNX: choose another one")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        facts = {
            "networks": list(options.networks),
            "images": options.images,
            "fused": options.fused,
            "threads": options.threads,
            "load_before": round(os.getloadavg()[0], 2),
            "mark": MARK,
        }
        prepare(options, folder)
        rows = []
        for name, network in options.networks.items():
            checkpoint = write_checkpoint(network, folder)
            for scheme in tqdm(options.schemes, name, unit="scheme", disable=None):
                rows.append({"network": name, **measure_apart(options, scheme, checkpoint, folder)})
                write_results(options.out, options.result, {**facts, "rows": rows}, table(rows))  # kept if stopped


if __name__ == "__main__":
    run_command(CostOptions, main)
