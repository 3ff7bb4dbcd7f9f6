"""What corrupted images cost quantized models beside the float one, in the manner of ImageNet-C:

python eval/robustness.py runs/ptq/fp32 runs/ptq/int8 runs/ptq/fp8

The first bundle is the reference. Every corruption and severity is kept in the output folder as it is measured, so
that an interrupted run goes on, and more of them can be added later. eval/metrics/corruptions.py says how images are
corrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.stats
import tyro
from tqdm import tqdm

from eval.benchmark.open_bundles import OpenBundles, open_bundles, open_fitting_data, predict_checked
from eval.benchmark.resume import claim
from eval.metrics.accuracy_drop import NO_DROP, Drop, unseen_points, widened
from eval.metrics.corruptions import CORRUPTIONS, SEVERITIES, CorruptedImages, after_framing, check_corruption
from eval.report.store import write_results
from illama.atomic_write import lock_folder, make_out, sweep, write_file
from illama.cli import run_command
from illama.data.datasets import evenly_spaced
from illama.errors import UserError
from illama.inference import chance_note
from illama.markdown_table import markdown as table

RESULTS, CELLS = "robustness", "cells"
CLEAN = ("clean", 0)
Cell = tuple[str, int]
Right = dict[str, np.ndarray]  # name of a model -> what it got right, booleans (images,)


@dataclass(frozen=True)
class RobustnessOptions:
    """Compare bundles on corrupted images.

    Attributes:
        bundles: of python quant/ptq.py; the first is what the others are held against.
        data: what they were trained on; its test split is corrupted.
        corruptions: any of the 15 of ImageNet-C.
        severities: 1 to 5.
        images: how many test images, evenly spaced.
        seed: of the corruptions and the intervals.
        workers: processes that corrupt images.
        out: where the results go, and where an interrupted run goes on.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional]
    data: str = "fashion-mnist"
    corruptions: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES
    images: int = 1000
    seed: int = 0
    workers: int = 0
    out: Path = Path("runs/robustness")

    def __post_init__(self) -> None:
        if min(self.seed, self.workers) < 0:
            raise UserError("--seed and --workers must be 0 or more")


@dataclass(frozen=True)
class Robustness:
    """One model over all corruptions and severities.

    Attributes:
        clean, corrupted: top-1 in percent; the second is the mean over corruptions, each the mean over its severities.
        kept: ``corrupted`` in percent of ``clean``; 0 where that is 0.
        drop: points of ``corrupted`` lost against the reference; paired bootstrap over the images.
        beyond_clean: points of it that are not lost on clean images already, likewise.
        by_corruption: corruption -> top-1 in percent.
    """

    clean: float
    corrupted: float
    kept: float
    drop: Drop
    beyond_clean: Drop
    by_corruption: dict[str, float]


def summarise(cells: Mapping[Cell, Right], seed: int = 0) -> dict[str, Robustness]:
    """Model -> its robustness; the first model is the reference.

    Args:
        cells: (corruption, severity) -> what each model got right there, on the same images throughout; with
            :data:`CLEAN` and at least one other.
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
    """The mean of paired differences (images,), in points, with a 95% percentile interval of the bootstrap.

    It is widened as that of :func:`eval.metrics.accuracy_drop.paired_drop` where no image was lost, or none gained, by
    the ``largest`` difference that an image may have.
    """
    points = float(differences.mean() * 100)
    low = high = points
    if np.ptp(differences) > 0:  # else every resample is alike
        interval = scipy.stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=10_000,
            batch=100,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        low, high = interval.low * 100, interval.high * 100
    return widened(
        points,
        low,
        high,
        bool((differences > 0).any()),
        bool((differences < 0).any()),
        largest * unseen_points(len(differences)),
    )


def measure(options: RobustnessOptions, bundles: OpenBundles) -> dict[Cell, Right]:
    """What every model gets right in every cell, measured or read from the output folder."""
    data = open_fitting_data(options.data, bundles.classes, bundles.preprocessing)
    images = evenly_spaced(data.test(), options.images)
    facts = {"data": options.data, "images": options.images, "seed": options.seed, **bundles.facts}
    claim(options.out, facts)
    make_out(options.out / CELLS)
    sweep(options.out / CELLS)
    wanted = [CLEAN, *((name, severity) for name in options.corruptions for severity in options.severities)]
    cells = {}
    for cell in tqdm(wanted, desc="corruptions", unit="cell"):
        path = options.out / CELLS / f"{cell[0]}-{cell[1]}.npz"
        if not path.exists():
            split = images if cell == CLEAN else CorruptedImages(images, bundles.preprocessing, *cell, options.seed)
            transform = bundles.preprocessing.transform() if cell == CLEAN else after_framing(bundles.preprocessing)
            logits, labels = predict_checked(bundles, split, transform, options.workers)
            with write_file(path) as draft, draft.open("wb") as file:
                np.savez(file, **{f"right/{model}": values.argmax(1) == labels for model, values in logits.items()})
        with np.load(path) as stored:
            cells[cell] = {model: stored[f"right/{model}"] for model in bundles.models}
    return cells


def markdown(results: Mapping[str, Robustness]) -> str:
    """Two tables: the models over all corruptions, and every corruption over the models."""

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
    heads = (
        "model",
        "clean top-1 %",
        "corrupted top-1 %",
        "kept %",
        "points lost (95% interval)",
        "beyond those on clean images",
    )
    by_corruption = [(name, *(f"{each.by_corruption[name]:.2f}" for each in results.values())) for name in corruptions]
    return f"{table(heads, models)}\n\n{table(('corruption', *results), by_corruption)}\n"


def as_json(
    options: RobustnessOptions, cells: Mapping[Cell, Right], results: Mapping[str, Robustness]
) -> dict[str, Any]:
    """The contents of robustness.json."""
    return {
        "data": options.data,
        "images": options.images,
        "seed": options.seed,
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


def main(options: RobustnessOptions) -> None:
    if not options.corruptions or not options.severities:
        raise UserError("give at least one corruption and one severity")
    for corruption in options.corruptions:
        for severity in options.severities:
            check_corruption(corruption, severity)
    with lock_folder(options.out):
        bundles = open_bundles(options.bundles)
        cells = measure(options, bundles)
        results = summarise(cells, options.seed)
        reference = next(iter(results))
        note = chance_note(reference, results[reference].clean, len(bundles.classes))
        print(
            f"{options.images} images of {options.data}, {len(options.corruptions)} corruptions at severities "
            f"{' '.join(map(str, options.severities))}\n"
        )
        write_results(options.out, RESULTS, as_json(options, cells, results), f"{markdown(results)}\n{note}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    run_command(RobustnessOptions, main)
