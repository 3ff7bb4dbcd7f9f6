"""Measures the memory of an evaluation as the data set grows: python benchmarks/evaluate_memory.py

Fashion-MNIST's test split is evaluated repeatedly with random weights and many classes, first by
eval.measure.evaluate_split.evaluate, then by illama.inference.predict, which keeps all logits. Peak memory is that of
the process so far, so the sizes are in ascending order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset

from illama.cli import run_command
from eval.measure.evaluate_split import evaluate
from eval.measure.machine import peak_memory_gib
from eval.report.store import write_results
from illama import ILLaMA, ModelConfig
from illama.data.datasets import Sample, open_data
from illama.errors import UserError
from illama.inference import predict, torch_infer
from illama.markdown_table import markdown

HEADINGS = ("by", "images", "classes", "peak MiB", "seconds")


@dataclass(frozen=True)
class MemoryOptions:
    """Evaluate data sets of increasing size, and report the peak memory after each.

    Attributes:
        repeats: how often the 10,000 images are evaluated, in ascending order.
        classes: number of classes of the network.
        out: folder of the results.
    """

    repeats: tuple[int, ...] = (1, 5)
    classes: int = 1000
    out: Path = Path("runs/evaluate-memory")

    def __post_init__(self) -> None:
        if not self.repeats or list(self.repeats) != sorted(self.repeats) or min(self.classes - 9, *self.repeats) < 1:
            raise UserError("--repeats must be ascending numbers from 1 on, and --classes 10 or more")


def main(options: MemoryOptions) -> None:
    torch.manual_seed(0)
    config = ModelConfig.preset("nano", num_classes=options.classes)
    data = open_data("fashion-mnist")
    models = {"nano": torch_infer(ILLaMA(config).eval())}
    transform = data.preprocessing(config.image_size, config.in_channels).transform()
    rows = [("nothing yet", "0", str(options.classes), f"{peak_memory_gib() * 1024:.0f}", "0.0")]
    runs: list[tuple[str, Callable[..., object], int]] = [("evaluate", evaluate, each) for each in options.repeats]
    for name, function, repeats in [*runs, ("predict", predict, options.repeats[-1])]:
        split: ConcatDataset[Sample] = ConcatDataset([data.test()] * repeats)
        start = time.perf_counter()
        function(models, split, transform)
        rows.append(
            (
                name,
                str(len(split)),
                str(options.classes),
                f"{peak_memory_gib() * 1024:.0f}",
                f"{time.perf_counter() - start:.1f}",
            )
        )
    content = {"rows": [dict(zip(HEADINGS, row, strict=True)) for row in rows]}
    write_results(options.out, "evaluate-memory", content, markdown(HEADINGS, rows))


if __name__ == "__main__":
    run_command(MemoryOptions, main)
