"""Train an iLLaMA from a recipe:

python illama/train.py --recipe in1k-tiny --data /imagenet
python illama/train.py --recipe nano-fashion-mnist --epochs 5 --out runs/try

On several GPUs: torchrun --nproc-per-node 8 illama/train.py --recipe in1k-tiny --data /imagenet

To resume an interrupted or killed run, start the same command again: it continues from the last checkpoint and ends
with the same weights, bit for bit on a CPU (some CUDA kernels sum in no fixed order).
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from illama.cli import run_command
from illama.training.recipe import DEFAULT_RECIPE, RECIPES, Recipe, recipe_of_command_line


def main(recipe: Recipe) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.atomic_write import lock_folder
    from illama.manifest import TRAINED, Manifest
    from illama.training.distributed import processes
    from illama.training.finish import write_bundle
    from illama.training.start import start_run
    from illama.training.trainer import fit

    recipe = replace(recipe, out=recipe.out.resolve())
    with processes() as group, lock_folder(recipe.out, group.main):
        run = start_run(recipe, group)
        fit(run)
        bundle = write_bundle(run)
    if group.main:
        scores = Manifest.read(bundle).scores
        assert scores is not None  # write_bundle evaluates
        print(
            f"top-1 {scores.values[TRAINED]:.2f}% on {scores.images} test images; bundle in {os.path.relpath(bundle)}"
        )


if __name__ == "__main__":
    run_command(Recipe, main, partial(recipe_of_command_line, Recipe, RECIPES, DEFAULT_RECIPE))
