"""Trains every step from ViT to iLLaMA: python benchmarks/roadmap.py

Every step of arXiv 2404.06773, Table 17 is trained with the same budget and the same seeds on Fashion-MNIST, and
tested on its 10,000 test images. The same command resumes an interrupted one, and adds seeds. It writes
``roadmap.json``, ``roadmap.md`` and plots to ``results/roadmap``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from many_runs import compare, final_top1, train_all
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from illama.cli import run_command
from eval.metrics.rank import attention_rank
from eval.report.store import write_results
from illama import ILLaMA
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.errors import UserError
from illama.inference import load_images
from illama.training.log import read_log

# The paper's augmentation before and after it is retuned.
_HEAVY: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0, "soft_mask": "none"}
_LIGHT: dict[str, Any] = {"mixup": 0.1, "cutmix": 0.1, "soft_mask": "none"}
RANK_IMAGES = 30


@dataclass(frozen=True)
class Step:
    """A step from ViT to iLLaMA.

    Attributes:
        name: name in the table.
        against: name of the step that it is compared with.
        changes: changes of the recipe.
        paper: the paper's top-1 of Tiny on ImageNet-1K in percent; None if it has none.
    """

    name: str
    against: str
    changes: dict[str, Any] = field(default_factory=dict)
    paper: float | None = None


_CAUSAL = "+ causal mask, class token first"  # the usual mask, before the softmax
_LIGHTER = "+ lighter mixup and cutmix"
STEPS = (
    Step("ViT", "", {"variant": "vit", **_HEAVY}, 73.8),
    Step("+ SwiGLU", "ViT", {"variant": "vit-swiglu", **_HEAVY}, 74.3),
    Step("+ RMSNorm", "+ SwiGLU", {"variant": "vit-rmsnorm", **_HEAVY}, 74.5),
    Step(_CAUSAL, "+ RMSNorm", {"variant": "causal-collapse", **_HEAVY}, 0.1),
    Step("(the same, mask after the softmax)", _CAUSAL, {"variant": "causal-collapse-post-softmax", **_HEAVY}),
    Step("(class token first, its row open)", "+ RMSNorm", {"variant": "causal-modified", **_HEAVY}, 72.5),
    Step("+ class token last", "+ RMSNorm", {"variant": "causal", **_HEAVY}, 71.9),
    Step("+ RoPE for learnable positions", "+ class token last", {"variant": "causal-rope", **_HEAVY}, 72.6),
    Step("+ learnable positions as well", "+ RoPE for learnable positions", {"variant": "illama", **_HEAVY}, 73.2),
    Step(_LIGHTER, "+ learnable positions as well", {"variant": "illama", **_LIGHT}, 74.3),
    Step("+ soft mask, linear = iLLaMA", _LIGHTER, {"variant": "illama", **_LIGHT, "soft_mask": "linear"}, 74.9),
    Step("(soft mask, constant)", _LIGHTER, {"variant": "illama", **_LIGHT, "soft_mask": "constant"}, 75.0),
)
VIT, LIGHTER, ILLAMA = STEPS[0], STEPS[9], STEPS[10]


@dataclass(frozen=True)
class RoadmapOptions:
    """Train every step from ViT to iLLaMA with the same budget, and compare.

    Attributes:
        seeds: number of runs per step, at least 2, for confidence intervals.
        epochs: number of passes over the 58,000 training images.
        width: embedding dimension of the nano preset, reduced so that all runs take about an hour on two cores.
        heads: number of attention heads.
        out: folder of the runs.
        results: folder of the table and plots.
    """

    seeds: int = 3
    epochs: int = 2
    width: int = 64
    heads: int = 2
    out: Path = Path("runs/roadmap")
    results: Path = Path("results/roadmap")


@dataclass(frozen=True)
class Row:
    """The results of a step.

    Attributes:
        name: name of the step.
        against: name of the step that it is compared with.
        top1: test top-1 in percent, for each seed.
        loss: mean training loss of the last tenth of training, for each seed.
        change: mean change of top-1 in points, paired by seed.
        interval: 95% confidence interval of ``change`` (Student's t over the seeds).
        paper_tiny_top1: see :class:`Step`.
    """

    name: str
    against: str
    top1: list[float]
    loss: list[float]
    change: float | None
    interval: tuple[float, float] | None
    paper_tiny_top1: float | None


def options_of(options: RoadmapOptions, step: Step, seed: int) -> dict[str, Any]:
    """Returns a run's options: the nano's recipe, the budget, and the step's changes."""
    return {
        "recipe": "nano-fashion-mnist",
        "width": options.width,
        "heads": options.heads,
        "epochs": options.epochs,
        "batch_size": 128,
        "micro_batch": 128,
        "mixup_probability": 1.0,
        "erasing": 0.0,
        "drop_path": 0.0,
        "ema_decay": 0.0,
        "warmup_epochs": options.epochs / 12,
        "soft_mask_epochs": options.epochs / 6,
        "compile": True,
        "workers": 0,
        "seed": seed,
        **step.changes,
    }


def folder_of(options: RoadmapOptions, step: Step, seed: int) -> Path:
    """Returns the folder of a run."""
    return (options.out / f"{STEPS.index(step):02d}-seed{seed}").resolve()


def summarize(options: RoadmapOptions) -> list[Row]:
    """Returns the rows of the table from the runs' files."""
    top1s: dict[str, np.ndarray] = {}
    rows = []
    for step in STEPS:
        folders = [folder_of(options, step, seed) for seed in range(options.seeds)]
        top1s[step.name] = np.array([final_top1(folder) for folder in folders])
        losses = [losses_of(folder)[1] for folder in folders]
        last = [float(np.mean(each[-(len(each) // 10) :])) for each in losses]
        change, interval = compare(top1s[step.name], top1s[step.against]) if step.against else (None, None)
        rows.append(Row(step.name, step.against, top1s[step.name].tolist(), last, change, interval, step.paper))
    return rows


def losses_of(folder: Path) -> tuple[list[int], list[float]]:
    """Returns the logged steps and their training losses."""
    rows = read_log(folder / "losses.csv")
    return [int(row["step"]) for row in rows], [float(row["train_loss"]) for row in rows]


def markdown(rows: list[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| step | top-1 %, mean (seeds) | change (95% interval) | against | train loss | paper's Tiny, ImageNet |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = ", ".join(f"{value:.1f}" for value in row.top1)
        change = f"{row.change:+.2f} ({row.interval[0]:+.2f} to {row.interval[1]:+.2f})" if row.interval else "-"
        paper = "-" if row.paper_tiny_top1 is None else row.paper_tiny_top1
        lines.append(
            f"| {row.name} | {np.mean(row.top1):.2f} ({seeds}) | {change} | {row.against or '-'} | "
            f"{np.mean(row.loss):.3f} | {paper} |"
        )
    return "\n".join(lines) + "\n"


def trained(options: RoadmapOptions, step: Step, seed: int) -> ILLaMA:
    """Loads a run's network, in evaluation mode."""
    return load_checkpoint(folder_of(options, step, seed) / "bundle").model


def draw_losses(options: RoadmapOptions, path: Path) -> None:
    """Plots the smoothed training losses of seed 0, with separate axes for heavy and light augmentation."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes: list[Axes] = figure.subplots(1, 2)
    for axis, title, mixing in zip(axes, ("heavy", "light"), (_HEAVY, _LIGHT), strict=True):
        for step in STEPS:
            if step.changes["mixup"] == mixing["mixup"]:
                steps, losses = losses_of(folder_of(options, step, 0))
                smooth = np.convolve(losses, np.ones(5) / 5, "valid")
                axis.plot(steps[4:], smooth, lw=1.2, label=step.name)
        axis.set(xlabel="step", ylabel="training loss", title=f"{title} mixup and cutmix")
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(path, dpi=110)


def measure_ranks(options: RoadmapOptions, path: Path) -> dict[str, list[list[float]]]:
    """Measures and plots the attention-map rank per layer and head, of the mean map of 30 test images."""
    data = open_data("fashion-mnist")
    images = torch.from_numpy(load_images(data.test(), data.preprocessing(28, 1).transform(), RANK_IMAGES)[0])
    ranks = {}
    for step in (VIT, LIGHTER, ILLAMA):
        models = [trained(options, step, seed) for seed in range(options.seeds)]
        ranks[step.name] = np.mean([attention_rank(model, images) for model in models], 0).tolist()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, values in ranks.items():
        layers = np.arange(1, len(values) + 1)
        axis.plot(layers, np.mean(values, axis=1), marker="o", label=name)
        axis.fill_between(layers, np.min(values, axis=1), np.max(values, axis=1), alpha=0.15)
    axis.set(xlabel="layer", ylabel="rank of 50 (mean and range of heads)", title="Attention-map rank at 0.8")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return ranks


def main(options: RoadmapOptions) -> None:
    if options.seeds < 2:
        raise UserError("--seeds must be at least 2 for confidence intervals")
    train_all(
        {
            folder_of(options, step, seed): options_of(options, step, seed)
            for seed in range(options.seeds)
            for step in STEPS
        }
    )
    options.results.mkdir(parents=True, exist_ok=True)
    rows = summarize(options)
    draw_losses(options, options.results / "loss.png")
    content = {
        "budget": {name: getattr(options, name) for name in ("epochs", "width", "heads", "seeds")},
        "rows": [asdict(row) for row in rows],
        "attention_rank": measure_ranks(options, options.results / "attention-rank.png"),
    }
    write_results(options.results, "roadmap", content, markdown(rows))


if __name__ == "__main__":
    run_command(RoadmapOptions, main)
