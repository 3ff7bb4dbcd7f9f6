"""Top-1 on corrupted images, and the drop of each model against the first, over all corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import scipy.stats
import torch
from torch.utils.data import Dataset

from eval.measure.open_bundles import OpenBundles, predict_checked
from eval.metrics.corruptions import CorruptedImages, after_framing
from eval.metrics.paired import NO_DROP, widened
from illama.atomic_write import make_out, sweep, write_file
from illama.checkpoints.tensor_files import read_tensors
from illama.data.datasets import Sample
from illama.errors import UserError
from illama.manifest import Drop
from illama.markdown_table import markdown
from illama.progress import track

CELLS = "cells"  # folder of the stored results, a file for each cell
CLEAN = ("clean", 0)
Cell = tuple[str, int]  # a corruption and a severity
Correct = dict[str, np.ndarray]  # model -> whether it is right on each image, bool (images,)


@dataclass(frozen=True)
class Robustness:
    """Top-1 of one model over all corruptions and severities.

    Attributes:
        clean: top-1 in percent on clean images.
        corrupted: top-1 in percent, averaged over the severities of each corruption and then over the corruptions.
        kept: ``corrupted`` in percent of ``clean``; 0 if ``clean`` is 0.
        drop: points of ``corrupted`` lost against the reference, with a paired bootstrap interval over the images.
        beyond_clean: ``drop`` minus the drop on clean images, with an interval of the same kind.
        by_corruption: corruption -> top-1 in percent.
    """

    clean: float
    corrupted: float
    kept: float
    drop: Drop
    beyond_clean: Drop
    by_corruption: dict[str, float]


def summarize(cells: Mapping[Cell, Correct], seed: int = 0) -> dict[str, Robustness]:
    """Returns the robustness of each model; the first model is the reference.

    Args:
        cells: which images each model gets right in each cell, the same images in all cells; with :data:`CLEAN` and
            at least one other cell.
        seed: random seed of the bootstrap.
    """
    models = list(cells[CLEAN])
    corruptions = list(dict.fromkeys(name for name, _ in cells if name != CLEAN[0]))

    def per_image(model: str) -> dict[str, np.ndarray]:
        return {
            name: np.mean([right[model] for cell, right in cells.items() if cell[0] == name], axis=0)
            for name in corruptions
        }

    means = {model: per_image(model) for model in models}
    corrupted = {model: np.mean(list(means[model].values()), axis=0) for model in models}
    clean = {model: cells[CLEAN][model].astype(float) for model in models}
    reference = models[0]
    results = {}
    for model in models:
        lost, lost_clean = corrupted[reference] - corrupted[model], clean[reference] - clean[model]
        top1 = float(corrupted[model].mean() * 100)
        results[model] = Robustness(
            clean=float(clean[model].mean() * 100),
            corrupted=top1,
            kept=float(top1 / clean[model].mean()) if clean[model].any() else 0.0,
            drop=NO_DROP if model == reference else mean_drop(lost, seed),
            beyond_clean=NO_DROP if model == reference else mean_drop(lost - lost_clean, seed, largest=2.0),
            by_corruption={name: float(values.mean() * 100) for name, values in means[model].items()},
        )
    return results


def mean_drop(differences: np.ndarray, seed: int = 0, largest: float = 1.0) -> Drop:
    """Returns the mean of paired differences (images,), in points, with a 95% percentile bootstrap interval.

    If no difference is positive, or none is negative, the interval is widened as in
    :func:`eval.metrics.paired.paired_drop`, by the ``largest`` difference that an image may have.
    """
    points = float(differences.mean() * 100)
    low = high = points
    if np.ptp(differences) > 0:  # otherwise all resamples are equal
        interval = scipy.stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=10_000,
            batch=100,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low * 100), float(interval.high * 100)
    lost, gained = bool((differences > 0).any()), bool((differences < 0).any())
    return widened(Drop(points, low, high), lost, gained, len(differences), largest)


def measure_cells(
    bundles: OpenBundles, images: Dataset[Sample], cells: Sequence[Cell], out: Path, seed: int = 0, workers: int = 0
) -> dict[Cell, Correct]:
    """Returns which images each model gets right, clean and in each cell.

    Args:
        out: folder where the result of each cell is stored; stored cells are not measured again.
        workers: number of processes that corrupt images.
    """
    make_out(out / CELLS)
    sweep(out / CELLS)
    measured = {}
    for cell in track([CLEAN, *cells], "corruptions", "cell"):
        path = out / CELLS / f"{cell[0]}-{cell[1]}.safetensors"
        if not path.exists():
            split = images if cell == CLEAN else CorruptedImages(images, bundles.preprocessing, *cell, seed)
            transform = bundles.preprocessing.transform() if cell == CLEAN else after_framing(bundles.preprocessing)
            logits, labels = predict_checked(bundles, split, transform, workers)
            right = {model: values.argmax(1) == labels for model, values in logits.items()}
            with write_file(path) as draft:
                draft.write_bytes(safetensors.numpy.save(right))
        stored = read_tensors(path, (torch.bool,))
        if stored.keys() != bundles.models.keys():
            raise UserError(f"{path} is damaged: delete it and run the command again")
        measured[cell] = {model: stored[model].numpy() for model in bundles.models}
    return measured


def robustness_tables(results: Mapping[str, Robustness]) -> str:
    """Returns two tables: the models over all corruptions, and every corruption by model."""
    reference = next(iter(results))
    models = [
        (
            name,
            f"{each.clean:.2f}",
            f"{each.corrupted:.2f}",
            f"{each.kept:.1f}",
            *(("reference", "") if name == reference else (str(each.drop), str(each.beyond_clean))),
        )
        for name, each in results.items()
    ]
    corruptions = results[reference].by_corruption
    lost = ("points lost (95% interval)", "beyond those on clean images")
    heads = ("model", "clean top-1 %", "corrupted top-1 %", "kept %", *lost)
    by_corruption = [(name, *(f"{each.by_corruption[name]:.2f}" for each in results.values())) for name in corruptions]
    return f"{markdown(heads, models)}\n\n{markdown(('corruption', *results), by_corruption)}\n"


def robustness_json(cells: Mapping[Cell, Correct], results: Mapping[str, Robustness]) -> dict[str, Any]:
    """Returns the results as robustness.json holds them."""
    return {
        "models": {name: asdict(each) for name, each in results.items()},
        "cells": [
            {
                "corruption": name,
                "severity": severity,
                "top1": {model: float(values.mean() * 100) for model, values in right.items()},
            }
            for (name, severity), right in cells.items()
        ],
    }
