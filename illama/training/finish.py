"""Ends a training run: writes its bundle."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import cast

from illama.atomic_write import write_folder
from illama.bundle import WEIGHTS
from illama.checkpoints.load import write_weights
from illama.manifest import TRAINED, Manifest, Provenance, Scores
from illama.models.illama import ILLaMA
from illama.training.log import plot_curve, read_log
from illama.training.trainer import Run


def write_bundle(run: Run) -> Path:
    """Writes a finished run as a bundle: the kept weights, a manifest with the test score, the log and its plot.

    Every process must call it, since all of them evaluate; the main process writes.
    """
    recipe, test = run.recipe, run.task.data.test()
    scores = Scores(run.score_name, len(cast(Sized, test)), {TRAINED: run.score(test)}, epochs=recipe.epochs)
    weights, config = run.kept_weights(), cast(ILLaMA, run.model).config
    folder = recipe.out / "bundle"
    if not run.processes.main:
        return folder
    manifest = Manifest(
        config.kind,
        config.to_dict(),
        run.task.preprocessing,
        tuple(run.task.data.classes),
        Provenance(seed=recipe.seed, inputs=run.task.inputs),
        scores=scores,
    )
    with write_folder(folder) as draft:
        write_weights(weights, config, draft / WEIGHTS)
        (draft / "log.csv").write_text((recipe.out / "log.csv").read_text())
        plot_curve(read_log(recipe.out / "log.csv"), draft / "curve.png")
        manifest.write(draft)
    return folder
