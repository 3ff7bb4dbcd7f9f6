"""Makes a bidirectional timm ViT causal by fine-tuning: python benchmarks/to_causal.py

Trains a small timm VisionTransformer on Fashion-MNIST without a mask, makes it causal (illama.models.timm_vit), and
fine-tunes it twice with the same budget: with alpha falling from 1 to 0, and with the hard mask from the start.
The same command resumes an interrupted one. It writes ``to_causal.json`` and ``to_causal.md`` to ``results/to-causal``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from illama.cli import run_command
from eval.metrics.paired import paired_drop
from eval.report.store import write_results
from illama.data.datasets import open_data
from illama.inference import predict, torch_infer
from illama.models.timm_vit import CausalVisionTransformer, to_causal
from illama.randomness import isolated_randomness
from illama.training.distributed import Processes
from illama.training.log import read_log
from illama.training.recipe import Recipe, load_recipe
from illama.training.schedules import SoftMaskSchedule
from illama.training.trainer import Run, Task, fit


@dataclass(frozen=True)
class ToCausalOptions:
    """Fine-tune a bidirectional ViT to a causal one, and report its accuracy after each epoch.

    Attributes:
        pretrain_epochs: number of epochs without a mask.
        epochs: number of epochs of each fine-tuning; alpha reaches 0 after two thirds of them.
        out: folder of the runs.
        results: folder of the table.
    """

    pretrain_epochs: int = 3
    epochs: int = 3
    out: Path = Path("runs/to-causal")
    results: Path = Path("results/to-causal")


def train(model: CausalVisionTransformer, recipe: Recipe) -> CausalVisionTransformer:
    """Trains ``model`` by the recipe, or resumes this run, and returns it."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    data = open_data(recipe.data)
    task = Task(data, data.preprocessing(28, 1))
    run = Run(recipe, task, model, Processes(0, 1, torch.device("cpu")))
    fit(run)
    return model.eval()


def right(model: CausalVisionTransformer, alpha: float) -> Any:
    """Returns which test images the model classifies correctly with the soft mask ``alpha``: (10000,) booleans."""
    data = open_data("fashion-mnist")
    model.soft_mask = alpha
    logits, labels = predict({"m": torch_infer(model)}, data.test(), data.preprocessing(28, 1).transform())
    return logits["m"].argmax(1) == labels


def main(options: ToCausalOptions) -> None:
    torch.set_num_threads(1)
    plain: dict[str, Any] = {
        "mixup": 0.0,
        "cutmix": 0.0,
        "mixup_probability": 0.0,
        "erasing": 0.0,
        "drop_path": 0.0,
        "ema_decay": 0.0,
    }
    recipe = replace(
        load_recipe("nano-fashion-mnist"), **plain, batch_size=128, micro_batch=128, workers=0, compile=True
    )
    first = replace(
        recipe,
        epochs=options.pretrain_epochs,
        warmup_epochs=0.25,
        soft_mask="constant",
        soft_mask_epochs=options.pretrain_epochs,
        out=options.out / f"bidirectional-{options.pretrain_epochs}",
    )
    then = replace(
        recipe, epochs=options.epochs, warmup_epochs=0, learning_rate=5e-4, soft_mask_epochs=options.epochs * 2 / 3
    )
    with isolated_randomness(0):
        vit = VisionTransformer(
            img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=2
        )
    start = train(to_causal(vit), first)
    results = {"bidirectional ViT": right(start, 1.0), "the same weights, hard mask": right(start, 0.0)}
    way = {}
    arms: dict[str, SoftMaskSchedule] = {
        "fine-tuned, alpha from 1 to 0": "linear",
        "fine-tuned, hard mask at once": "none",
    }
    for name, schedule in arms.items():
        model = to_causal(vit)
        model.load_state_dict(start.state_dict())
        out = options.out / f"{schedule}-after-{options.pretrain_epochs}"
        results[name] = right(train(model, replace(then, soft_mask=schedule, out=out)), 0.0)
        way[name] = [
            {
                "epoch": int(row["epoch"]),
                "alpha": float(row["soft_mask"]),
                "validation_top1_hard_mask": float(row["validation_top1"]),
            }
            for row in read_log(out / "log.csv")
        ]
    write(options, results, way)


def write(options: ToCausalOptions, results: dict[str, Any], way: dict[str, Any]) -> None:
    """Writes the table, with accuracy drops from the bidirectional ViT on the same images."""
    lines = ["| network | test top-1 % | drop (95% interval) |", "|---|---|---|"]
    reference = results["bidirectional ViT"]
    test = {}
    for name, each in results.items():
        drop = paired_drop(reference, each)
        test[name] = {"top1": 100 * float(each.mean()), "drop": drop.points, "ci95": [drop.low, drop.high]}
        lines.append(f"| {name} | {100 * each.mean():.2f} | {drop.points:+.2f} ({drop.low:+.2f} to {drop.high:+.2f}) |")
    write_results(options.results, "to_causal", {"test": test, "on_the_way": way}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(ToCausalOptions, main)
