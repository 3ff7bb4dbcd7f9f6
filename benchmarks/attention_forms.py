"""Compares the speed of the two forms of attention on this machine: python benchmarks/attention_forms.py

Times a forward pass and a training step of the whole network in the plain and the fused form, alternating in every
round, and prints the ratio. illama.models.attention.fastest_form uses the result.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from illama.cli import run_command
from eval.report.store import write_results
from illama import ILLaMA, ModelConfig
from illama.markdown_table import markdown
from illama.models.attention import Form

ALPHAS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time the plain and the fused form of the attention.

    Attributes:
        sizes: names of model sizes.
        batches: batch sizes.
        rounds: number of timed calls of each form.
        out: folder of the results.
    """

    sizes: tuple[str, ...] = ("nano", "tiny")
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 20
    out: Path = Path("results/attention-forms")


def forward(model: ILLaMA, images: Tensor) -> None:
    with torch.inference_mode():
        model.eval()(images)


def training_step(model: ILLaMA, images: Tensor) -> None:
    model.train()(images).square().mean().backward()
    model.zero_grad(set_to_none=True)


def time_forms(model: ILLaMA, images: Tensor, call: Callable[[ILLaMA, Tensor], None], rounds: int) -> dict[Form, float]:
    """Returns the median milliseconds of each form."""
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


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table of the fused form's speedup, forward / training step, with a row for each size and batch."""
    cells = {
        (f"{row['size']}, batch {row['batch']}", row["alpha"], row["call"]): row["plain"] / row["fused"] for row in rows
    }
    lines = [
        (
            place,
            *(f"{cells[place, alpha, 'forward']:.2f} / {cells[place, alpha, 'training_step']:.2f}" for alpha in ALPHAS),
        )
        for place in dict.fromkeys(place for place, _, _ in cells)
    ]
    return markdown(("forward / training step", *(f"alpha {alpha:g}" for alpha in ALPHAS)), lines)


def main(options: BenchmarkOptions) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size, batch in tqdm(list(itertools.product(options.sizes, options.batches)), unit="network"):
        config = ModelConfig.preset(size)
        model = ILLaMA(config).to(device)
        images = torch.randn(batch, config.in_channels, config.image_size, config.image_size, device=device)
        for alpha, call in itertools.product(ALPHAS, (forward, training_step)):
            model.soft_mask = alpha
            times = time_forms(model, images, call, options.rounds)
            rows.append(
                {
                    "size": size,
                    "batch": batch,
                    "alpha": alpha,
                    "call": call.__name__,
                    "plain": times["plain"],
                    "fused": times["fused"],
                }
            )
    write_results(options.out, "attention-forms", {"milliseconds": rows}, table(rows))


if __name__ == "__main__":
    run_command(BenchmarkOptions, main)
