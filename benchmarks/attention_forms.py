"""Which exact form of the attention is fastest here: python benchmarks/attention_forms.py

Times the whole network, forward alone and a training step, in the plain and the fused form, in turn in
every round, and prints the ratio. illama.masks.fastest_form holds the outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.machine import describe_machine
from illama import ILLaMA, ModelConfig
from illama.errors import run_command
from illama.masks import Form


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time the plain and the fused form of the attention.

    Attributes:
        sizes: presets of ModelConfig.
        batches: images per call.
        rounds: timed calls of each form.
    """

    sizes: tuple[str, ...] = ("nano", "tiny")
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 20


def forward(model: ILLaMA, images: Tensor) -> None:
    with torch.inference_mode():
        model.eval()(images)


def training_step(model: ILLaMA, images: Tensor) -> None:
    model.train()(images).square().mean().backward()
    model.zero_grad(set_to_none=True)


def time_forms(model: ILLaMA, images: Tensor, call: Callable[[ILLaMA, Tensor], None], rounds: int) -> dict[Form, float]:
    """Median milliseconds of each form."""
    forms: tuple[Form, Form] = ("plain", "fused")
    times: dict[Form, list[float]] = {form: [] for form in forms}
    for index in range(rounds + 3):
        for form in forms:
            model.set_attention_form(form)
            start = time.perf_counter()
            call(model, images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if index >= 3:
                times[form].append((time.perf_counter() - start) * 1e3)
    return {form: float(np.median(values)) for form, values in times.items()}


def main(options: BenchmarkOptions) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(describe_machine())
    print(f"{'':38} {'plain ms':>10} {'fused ms':>10} {'ratio':>8}")
    for size in options.sizes:
        config = ModelConfig.preset(size)
        model = ILLaMA(config).to(device)
        for batch in options.batches:
            images = torch.randn(batch, config.in_channels, config.image_size, config.image_size, device=device)
            for alpha in (0.0, 0.5, 1.0):
                model.soft_mask = alpha
                for call in (forward, training_step):
                    times = time_forms(model, images, call, options.rounds)
                    label = f"{size} batch {batch} alpha {alpha} {call.__name__}"
                    ratio = times["plain"] / times["fused"]
                    print(f"{label:38} {times['plain']:10.2f} {times['fused']:10.2f} {ratio:8.2f}", flush=True)


if __name__ == "__main__":
    run_command(BenchmarkOptions, main)
