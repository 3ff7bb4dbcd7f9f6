"""Training runs of a UperNet, on an iLLaMA or a ViT of timm, on images with a class for every pixel."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from illama.checkpoints.huggingface import is_huggingface
from illama.checkpoints.open_checkpoint import open_checkpoint
from illama.checkpoints.timm_checkpoint import TimmCheckpoint
from illama.data.ade20k import IGNORED, AugmentedMaps, SegmentationFolder
from illama.data.webdataset import Sample
from illama.errors import UserError
from illama.inference import torch_infer
from illama.manifest import Metric
from illama.models.upernet import SegmentationConfig, Segmenter, TimmSegmentationConfig, TimmUperNet, UperNet
from illama.options import SourceOptions
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
    make = _other_network if recipe.model == "hf" or recipe.model.startswith("timm:") else _illama_network
    network, inputs, colors = make(recipe, len(data.classes))
    preprocessing = data.preprocessing(network.config.size[0], network.config.in_channels)
    loss = partial(map_loss, smoothing=recipe.label_smoothing)
    return SegmentationRun(recipe, Task(data, replace(preprocessing, **colors), inputs, loss), network, group)


_Made = tuple[Segmenter, dict[str, str], dict[str, Any]]
"""A network, the SHA-256 of each file of its initial weights, and values that replace ImageNet's preprocessing."""


def _illama_network(recipe: SegmentationOptions, classes: int) -> _Made:
    if recipe.model_args:
        raise UserError("--model-args is for --model timm:NAME: leave it out")
    if recipe.init and is_huggingface(recipe.init):
        raise UserError(f"{recipe.init} is a folder of Hugging Face: give --model hf")
    shape = {**model_options(recipe), "decoder_channels": recipe.decoder_channels}
    config = SegmentationConfig.preset(recipe.model, recipe.variant, **shape, num_classes=classes)
    with isolated_randomness(recipe.seed):
        network = initialize(UperNet(config, recipe.drop_path, recipe.dropout), recipe, new_head=True)
    return network, hash_inputs(recipe), {}


def _other_network(recipe: SegmentationOptions, classes: int) -> _Made:
    given = model_options(recipe).keys() - {"image_size"}
    if recipe.init is None or recipe.variant != "illama" or recipe.dropout or recipe.soft_mask != "none" or given:
        raise UserError(
            "a network of timm or Hugging Face takes its weights from --init, and none of --variant, --dropout, "
            "--soft-mask and the sizes but --image-size"
        )
    size, options = recipe.image_size, recipe.model_args
    loaded = open_checkpoint(SourceOptions(recipe.init, recipe.model, image_size=size, model_args=options, head="none"))
    assert isinstance(loaded, TimmCheckpoint) and loaded.preprocessing is not None
    settings, (side, width) = loaded.model.config, loaded.model.config.size
    if side != width:
        raise UserError(f"the network takes images of {side} x {width}, and segmentation squares: give --image-size")
    channels, decoder = settings.in_channels, recipe.decoder_channels
    config = TimmSegmentationConfig(
        settings.name, side, channels, classes, options=loaded.options, decoder_channels=decoder
    )
    with isolated_randomness(recipe.seed):
        network = TimmUperNet(config, recipe.drop_path)
    state = loaded.model.state_dict()
    network.load_state_dict(
        {name: state[name] for name in network.state_dict() if name.startswith("vit.")}, strict=False
    )
    return network, loaded.digests(), {"mean": loaded.preprocessing.mean, "std": loaded.preprocessing.std}


def map_loss(images: Tensor, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the cross entropy with label smoothing, averaged over pixels that belong to a class; 0 if there are none.

    Args:
        logits: (B, classes, H, W).
        targets: class indices (B, H, W).
    """
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return total / (targets != IGNORED).sum().clamp(min=1)
