"""A training run from its start to its bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from illama.atomic_write import lock_folder, write_folder
from illama.bundle import WEIGHTS
from illama.checkpoints.load import write_weights
from illama.manifest import TRAINED, Manifest, Provenance, Scores
from illama.models.illama import ILLaMA
from illama.training.distributed import Processes, processes
from illama.training.log import plot_curve, read_log
from illama.training.recipe import TrainingOptions
from illama.training.trainer import Run, fit

Options = TypeVar("Options", bound=TrainingOptions)


def train(options: Options, start: Callable[[Options, Processes], Run]) -> None:
    """Runs a training, or continues one that was interrupted, and writes its bundle; prints its score.

    Args:
        start: returns the run.
    """
    options = replace(options, out=options.out.resolve())
    with processes() as group, lock_folder(options.out, group.main):
        run = start(options, group)
        fit(run)
        bundle = write_bundle(run)
    if group.main:
        scores = Manifest.read(bundle).scores
        assert scores is not None  # write_bundle evaluates
        title, split = ("top-1", "test") if scores.metric == "top1" else ("mIoU", "validation")
        where = os.path.relpath(bundle)
        print(f"{title} {scores.values[TRAINED]:.2f}% on {scores.images} {split} images; bundle in {where}")


def write_bundle(run: Run) -> Path:
    """Writes a finished run as a bundle: the kept weights, a manifest with the test score, the log and its plot.

    Every process must call it, since all of them evaluate; the main process writes.
    """
    recipe, task, test = run.recipe, run.task, run.task.data.test()
    scores = Scores(run.score_name, len(cast(Sized, test)), {TRAINED: run.score(test)}, epochs=recipe.epochs)
    weights, config = run.kept_weights(), cast(ILLaMA, run.model).config
    folder = recipe.out / "bundle"
    if not run.processes.main:
        return folder
    classes, provenance = tuple(task.data.classes), Provenance(seed=recipe.seed, inputs=task.inputs)
    manifest = Manifest(config.kind, config.to_dict(), task.preprocessing, classes, provenance, scores=scores)
    with write_folder(folder) as draft:
        write_weights(weights, config, draft / WEIGHTS)
        (draft / "log.csv").write_text((recipe.out / "log.csv").read_text())
        plot_curve(read_log(recipe.out / "log.csv"), draft / "curve.png")
        manifest.write(draft)
    return folder
