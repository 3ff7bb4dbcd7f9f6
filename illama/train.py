"""Train an iLLaMA from a recipe:

python illama/train.py --recipe in1k-tiny --data /imagenet
python illama/train.py --recipe nano-fashion-mnist --epochs 5 --out runs/try

On several GPUs: torchrun --nproc-per-node 8 illama/train.py --recipe in1k-tiny --data /imagenet

To resume an interrupted or killed run, start the same command again: it continues from the last checkpoint and ends
with the same weights, bit for bit on a CPU (some CUDA kernels sum in no fixed order).
"""

from __future__ import annotations

from functools import partial

from illama.cli import run_command
from illama.training.recipe import DEFAULT_RECIPE, RECIPES, Recipe, recipe_of_command_line


def main(recipe: Recipe) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from illama.training.finish import train
    from illama.training.start import start_run

    train(recipe, start_run)


if __name__ == "__main__":
    run_command(Recipe, main, partial(recipe_of_command_line, Recipe, RECIPES, DEFAULT_RECIPE))
