"""Train an iLLaMA by a recipe: python illama/train.py --recipe in1k-tiny --data /imagenet

On several GPUs: torchrun --nproc-per-node 8 illama/train.py --recipe in1k-tiny --data /imagenet

Interrupted or killed, the same command goes on from the last checkpoint and ends with the same weights (to the
bit on a CPU; some of CUDA's kernels add in no fixed order).
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from illama.atomic_write import lock_folder, write_folder
from illama.bundle import WEIGHTS, Manifest, command_line, is_bundle, sha256
from illama.checkpoints.llama_init import initialise_from_llama
from illama.checkpoints.load import initialise_from, write_weights
from illama.cli import run_command
from illama.data.augmentation import seed_everything
from illama.data.datasets import ImageData, open_data
from illama.errors import UserError
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA
from illama.training.distributed import Processes, processes
from illama.training.log import plot_curve, read_log
from illama.training.recipe import DEFAULT_RECIPE, RECIPES, Recipe, recipe_of_command_line
from illama.training.trainer import Run, fit

Network = TypeVar("Network", bound=ILLaMA)
_MODEL_OPTIONS = ("image_size", "patch_size", "in_channels", "width", "depth", "heads", "mask")


def make_model(recipe: Recipe, classes: int) -> ILLaMA:
    """The recipe's network with its starting weights.

    Raises:
        UserError: they cannot be had, or the recipe is one of fine-tuning and names none.
    """
    if recipe.new_head and not recipe.init:
        raise UserError("this recipe fine-tunes: name the weights with --init, or add --no-new-head to start anew")
    config = ModelConfig.preset(recipe.model, recipe.variant, **model_options(recipe), num_classes=classes)
    seed_everything(recipe.seed)
    return initialise(ILLaMA(config, recipe.drop_path, recipe.dropout), recipe)


def model_options(recipe: Recipe) -> dict[str, Any]:
    """What the recipe changes of its preset."""
    return {name: value for name in _MODEL_OPTIONS if (value := getattr(recipe, name)) is not None}


def initialise(model: Network, recipe: Recipe) -> Network:
    """``model`` with the weights that the recipe names for the start; UserError if they cannot be had."""
    if recipe.init:
        initialise_from(model, recipe.init, new_head=recipe.new_head)
    if recipe.init_llama:
        initialise_from_llama(model, recipe.init_llama)
    return model


def check_class_order(init: Path, classes: Sequence[str]) -> None:
    """UserError if a bundle whose head is kept has the classes of the data in another order."""
    known = Manifest.read(init).classes if init.is_dir() and is_bundle(init) else []
    if sorted(known) == sorted(classes) and list(known) != list(classes):
        raise UserError(f"{init} has the classes in another order: give another --class-order, or --new-head")


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files that the starting weights come from; of a LLaMA its config and index stand for them."""
    files = []
    if recipe.init:
        files = [recipe.init / WEIGHTS if recipe.init.is_dir() else recipe.init]
    if recipe.init_llama:
        files = sorted(recipe.init_llama.glob("*.json"))
    return {str(file): sha256(file) for file in files}


def start_run(recipe: Recipe, group: Processes) -> Run:
    """Open the data, make the network, and go on from ``recipe.out`` if a run was interrupted there."""
    if not recipe.data:
        raise UserError("no images to train on: give --data (see --help)")
    data: ImageData = open_data(recipe.data, recipe.exif or "apply", recipe.class_order or "words")
    model = make_model(recipe, len(data.classes))
    if recipe.init and not recipe.new_head:
        check_class_order(recipe.init, data.classes)
    preprocessing = data.preprocessing(model.config.image_size, model.config.in_channels)
    return Run(recipe, data, preprocessing, model, group, inputs=inputs_of(recipe))


def write_bundle(run: Run) -> Path:
    """The finished run as a bundle: the kept weights, manifest with the score on the test images, log and curve."""
    recipe, test = run.recipe, run.data.test()
    metrics = {
        f"test_{run.score_name}": run.score(test),
        "test_images": len(cast(Sized, test)),
        "epochs": recipe.epochs,
    }
    weights, config = run.kept_weights(), cast(ILLaMA, run.model).config
    folder = recipe.out / "bundle"
    if not run.processes.main:
        return folder
    manifest = Manifest(
        command_line(),
        config.to_dict(),
        asdict(run.preprocessing),
        list(run.data.classes),
        recipe.seed,
        run.inputs,
        metrics,
    )
    with write_folder(folder) as draft:
        write_weights(weights, config, draft / WEIGHTS)
        (draft / "log.csv").write_text((recipe.out / "log.csv").read_text())
        plot_curve(read_log(recipe.out / "log.csv"), draft / "curve.png")
        manifest.write(draft)
    return folder


def main(recipe: Recipe) -> None:
    recipe = replace(recipe, out=recipe.out.resolve())
    with processes() as group, lock_folder(recipe.out, group.main):
        run = start_run(recipe, group)
        fit(run)
        bundle = write_bundle(run)
    if group.main:
        metrics = Manifest.read(bundle).metrics
        print(f"top-1 {metrics['test_top1']:.2f}% on {metrics['test_images']} test images; bundle in {bundle}")


if __name__ == "__main__":
    run_command(Recipe, main, partial(recipe_of_command_line, Recipe, RECIPES, DEFAULT_RECIPE))
