"""Quantization-aware training's own parts: what the quantized network learns from, and how its scales are learned.

The rounding and its gradients are :mod:`quant.quantizers.layers`'; the training itself is
:mod:`illama.training.trainer`'s.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from illama.models.attention import SoftMasked
from illama.training.recipe import TrainingOptions
from illama.training.trainer import Groups, parameter_groups
from quant.quantizers.layers import quantizers


class Distillation:
    """A loss that pulls the logits towards those of the network in floating point (Hinton et al., arXiv 1503.02531).

    share * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - share) * cross entropy with the labels

    T^2 keeps the soft part's gradients as large as the hard part's (section 2 there). Both networks see the same
    augmented and mixed images, and the teacher always masks hard: it is what the student shall be at the end.

    Args:
        teacher: in floating point; copied, never trained.
        share: of the soft targets, 0..1; the rest is the labels'.
        recipe: gives the precision that the teacher computes in, and whether it is compiled.
    """

    def __init__(
        self, teacher: SoftMasked, temperature: float, share: float, recipe: TrainingOptions, device: torch.device
    ) -> None:
        network = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        network.soft_mask = 0.0
        self.teacher = torch.compile(network) if recipe.compile else network
        self.temperature, self.share = temperature, share
        self.autocast = torch.autocast(
            device.type, getattr(torch, recipe.autocast), enabled=recipe.autocast != "float32"
        )

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """images (B, C, H, W), logits and targets (B, classes) -> a scalar."""
        with torch.no_grad(), self.autocast:
            wanted = self.teacher(images).float()
        student, teacher = ((x / self.temperature).log_softmax(1) for x in (logits, wanted))
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2
        return self.share * soft + (1 - self.share) * F.cross_entropy(logits, targets)


def learn_scales(model: SoftMasked) -> None:
    """Make every scale of a quantized network a parameter, in place."""
    for _, quantizer in quantizers(model):
        quantizer.learn_scale()


def settle_scales(model: SoftMasked) -> None:
    """Make a trained network again what calibration gives: exportable, every scale a constant."""
    for _, quantizer in quantizers(model):
        quantizer.settle_scale()


def scale_groups(scale_rate: float) -> Groups:
    """Parameter groups in which no scale decays and each moves in proportion to its size.

    Adam moves a value by its learning rate whatever the size of its gradient (so that LSQ's gradient scale cancels
    out, and matters to SGD alone), and a network's scales lie orders of magnitude apart. So the learning rate of a
    scale tensor is the network's times ``scale_rate`` times the tensor's calibrated mean.
    """

    def groups(recipe: TrainingOptions, model: SoftMasked) -> list[dict[str, Any]]:
        scales = [quantizer.scale for _, quantizer in quantizers(model)]
        own = {id(scale) for scale in scales}
        others = parameter_groups(recipe, model)
        for group in others:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        # The scales come first: the log shows the last group's learning rate.
        return [
            {"params": [scale], "weight_decay": 0.0, "lr_scale": scale_rate * float(scale.detach().mean())}
            for scale in scales
        ] + [group for group in others if group["params"]]

    return groups
