"""Starts a training run: opens the data, creates the network with its initial weights, and resumes a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from illama.bundle import sha256, weights_of
from illama.checkpoints.llama_init import initialize_from_llama
from illama.checkpoints.load import initialize_from
from illama.data.datasets import ImageData, note_channels, open_data, unlabeled
from illama.errors import UserError
from illama.manifest import Manifest, is_bundle
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA
from illama.randomness import isolated_randomness
from illama.training.distributed import Processes
from illama.training.recipe import NetworkOptions, Recipe
from illama.training.trainer import Run, Task

Network = TypeVar("Network", bound=ILLaMA)
_MODEL_OPTIONS = ("image_size", "patch_size", "in_channels", "width", "depth", "heads", "mask")


def start_run(recipe: Recipe, group: Processes) -> Run:
    """Opens the data, creates the network, and resumes from the checkpoint in ``recipe.out``, if there is one.

    Raises:
        UserError: ``recipe.data`` is not given, or the data, the initial weights or the checkpoint cannot be used.
    """
    if not recipe.data:
        raise UserError("no images to train on: give --data (see --help)")
    data: ImageData = open_data(recipe.data, recipe.exif or "apply", recipe.class_order or "words")
    if not data.labeled:
        raise unlabeled(recipe.data)
    model = make_model(recipe, len(data.classes))
    if recipe.init and not recipe.new_head:
        check_class_order(recipe.init, data.classes)
    preprocessing = data.preprocessing(model.config.image_size, model.config.in_channels)
    note_channels(data.test(), model.config.in_channels)
    return Run(recipe, Task(data, preprocessing, hash_inputs(recipe)), model, group)


def make_model(recipe: Recipe, classes: int) -> ILLaMA:
    """Returns the recipe's network with its initial weights.

    Raises:
        UserError: the weights cannot be used, or the recipe is for fine-tuning and names no weights.
    """
    if recipe.new_head and not recipe.init:
        raise UserError("this recipe fine-tunes: give weights with --init, or start from scratch with --no-new-head")
    config = ModelConfig.preset(recipe.model, recipe.variant, **model_options(recipe), num_classes=classes)
    with isolated_randomness(recipe.seed):
        return initialize(ILLaMA(config, recipe.drop_path, recipe.dropout), recipe, recipe.new_head)


def model_options(recipe: NetworkOptions) -> dict[str, Any]:
    """Returns the fields of :class:`ModelConfig` that the recipe overrides in its preset."""
    return {name: value for name in _MODEL_OPTIONS if (value := getattr(recipe, name)) is not None}


def initialize(model: Network, recipe: NetworkOptions, new_head: bool) -> Network:
    """Loads the initial weights that the recipe names into ``model``; raises UserError if they cannot be used."""
    if recipe.init:
        initialize_from(model, recipe.init, new_head=new_head)
    if recipe.init_llama:
        initialize_from_llama(model, recipe.init_llama)
    return model


def check_class_order(init: Path, classes: Sequence[str]) -> None:
    """Raises UserError if the bundle ``init``, whose head is kept, has the data's classes in another order."""
    known = Manifest.read(init).classes if init.is_dir() and is_bundle(init) else []
    if sorted(known) == sorted(classes) and list(known) != list(classes):
        raise UserError(f"{init} has the classes in another order: give another --class-order, or --new-head")


def hash_inputs(recipe: NetworkOptions) -> dict[str, str]:
    """Returns path -> SHA-256 of the files of the initial weights; for a LLaMA, only of its config and index."""
    files = []
    if recipe.init:
        files = [weights_of(recipe.init) if recipe.init.is_dir() else recipe.init]
    if recipe.init_llama:
        files = sorted(recipe.init_llama.glob("*.json"))
    return {str(file): sha256(file) for file in files}
