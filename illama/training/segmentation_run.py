"""Training runs of a UperNet, on an iLLaMA or a ViT of timm, on images with a class for every pixel."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from illama.checkpoints.huggingface import is_huggingface, load_huggingface
from illama.checkpoints.timm_checkpoint import load_timm
from illama.checkpoints.timm_source import parse_options
from illama.data.ade20k import IGNORED, AugmentedMaps, SegmentationFolder
from illama.data.preprocessing import Preprocessing
from illama.data.webdataset import Sample
from illama.errors import UserError
from illama.inference import torch_infer
from illama.manifest import Metric
from illama.models.upernet import SegmentationConfig, TimmSegmentationConfig, TimmUperNet, UperNet
from illama.randomness import isolated_randomness
from illama.segmentation_scores import Scores, predict_map, score_images
from illama.training.distributed import Processes
from illama.training.segmentation_options import SegmentationOptions
from illama.training.start import hash_inputs, initialize, model_options
from illama.training.trainer import Mix, Run, Task


class SegmentationRun(Run):
    """A :class:`Run` of a UperNet, evaluated on whole images with a sliding window."""

    score_name: ClassVar[Metric] = "miou"

    def augmented(self) -> AugmentedMaps:
        return AugmentedMaps(self.images, self.task.preprocessing, self.recipe.seed)

    def mixer(self) -> Mix:
        return lambda images, labels: (images, labels.long())  # without mixup

    def score(self, split: Dataset[Sample]) -> float:
        """Returns the mIoU in percent; the processes share the images, and each image counts once."""
        model = self.kept.eval()
        model.soft_mask = 0.0
        own, counted = self.processes.share(len(cast(Sized, split)))
        counts = score_images(
            {"kept": torch_infer(model)},
            Subset(split, own),
            len(self.task.data.classes),
            partial(predict_map, preprocessing=self.task.preprocessing),
            workers=self.recipe.workers,
            progress=self.processes.main,
        )
        own_sum = counts["kept"][:counted].sum(0)
        whole = self.processes.sum(*own_sum.ravel().tolist())
        return Scores.of(np.reshape(whole, own_sum.shape)).miou


def start_segmentation(recipe: SegmentationOptions, group: Processes) -> SegmentationRun:
    """Opens the data, creates the network, and resumes from the checkpoint in ``recipe.out``, if there is one.

    Raises:
        UserError: ``recipe.data`` is not given, or the data, the initial weights or the checkpoint cannot be used.
    """
    if not recipe.data:
        raise UserError("no images to train on: give --data (see --help)")
    data = SegmentationFolder(Path(recipe.data), recipe.exif or "apply")
    make_task = partial(Task, data, loss=partial(map_loss, smoothing=recipe.label_smoothing))
    if recipe.model_args and not recipe.model.startswith("timm:"):
        raise UserError("--model-args is for --model timm:NAME: leave it out")
    if recipe.model != "hf" and recipe.init and is_huggingface(recipe.init):
        raise UserError(f"{recipe.init} is a folder of Hugging Face: give --model hf")
    if recipe.model.startswith("timm:") or recipe.model == "hf":
        model, given, inputs = _timm_network(recipe, len(data.classes))
        preprocessing = data.preprocessing(given.size[0], given.in_channels)
        task = make_task(replace(preprocessing, mean=given.mean, std=given.std), inputs)
        return SegmentationRun(recipe, task, model, group)
    shape = {**model_options(recipe), "decoder_channels": recipe.decoder_channels}
    config = SegmentationConfig.preset(recipe.model, recipe.variant, **shape, num_classes=len(data.classes))
    with isolated_randomness(recipe.seed):
        network = initialize(UperNet(config, recipe.drop_path, recipe.dropout), recipe, new_head=True)
    preprocessing = data.preprocessing(config.image_size, config.in_channels)
    return SegmentationRun(recipe, make_task(preprocessing, hash_inputs(recipe)), network, group)


def _timm_network(recipe: SegmentationOptions, classes: int) -> tuple[TimmUperNet, Preprocessing, dict[str, str]]:
    """Returns a UperNet on a ViT with the weights of ``--init``, its preprocessing, and its files' SHA-256."""
    given = sorted(option for option in model_options(recipe) if option != "image_size")
    if recipe.init is None or recipe.variant != "illama" or recipe.dropout or recipe.soft_mask != "none" or given:
        raise UserError(
            "a network of timm or Hugging Face takes its weights from --init, and none of --variant, --dropout, "
            "--soft-mask and the sizes but --image-size"
        )
    if recipe.model == "hf":
        if not is_huggingface(recipe.init):
            raise UserError(f"{recipe.init} is no folder of Hugging Face: give one, or --model timm:NAME")
        loaded = load_huggingface(recipe.init, recipe.image_size, "none")
    else:
        name, options = recipe.model.removeprefix("timm:"), parse_options(recipe.model_args)
        loaded = load_timm(name, recipe.init, recipe.image_size, options, "none")
    settings, (side, width), preprocessing = loaded.model.config, loaded.model.config.size, loaded.preprocessing
    assert preprocessing is not None  # timm's are known
    if side != width:
        raise UserError(f"the network takes images of {side} x {width}, and segmentation squares: give --image-size")
    config = TimmSegmentationConfig(
        settings.name,
        side,
        settings.in_channels,
        classes,
        options=loaded.options,
        decoder_channels=recipe.decoder_channels,
    )
    with isolated_randomness(recipe.seed):
        network = TimmUperNet(config, recipe.drop_path)
    own = {name for name in network.state_dict() if name.startswith("vit.")}
    network.load_state_dict({name: loaded.model.state_dict()[name] for name in own}, strict=False)
    return network, preprocessing, loaded.digests()


def map_loss(images: Tensor, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the cross entropy with label smoothing, averaged over pixels that belong to a class; 0 if there are none.

    Args:
        logits: (B, classes, H, W).
        targets: class indices (B, H, W).
    """
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return total / (targets != IGNORED).sum().clamp(min=1)
