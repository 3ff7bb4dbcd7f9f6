"""The loss and the parameter groups of quantization-aware training.

Fake quantization and its gradients are in :mod:`quant.quantizers.layers`, the trainer in
:mod:`illama.training.trainer`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illama.models.attention import MaskedNetwork
from illama.training.recipe import TrainingOptions
from illama.training.trainer import Groups, parameter_groups
from quant.quantizers.layers import quantizers


class Distillation:
    """Distillation from the floating-point network (Hinton et al., arXiv 1503.02531).

    share * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - share) * cross entropy with the labels

    T^2 gives the gradients of both parts the same magnitude (section 2 of the paper). If the output is features, the
    loss is the power of their difference divided by that of the teacher's: the inverse of their SQNR. Both networks get
    the same augmented and mixed images. The teacher always uses the hard mask, which is also the student's at the end.

    Args:
        teacher: floating-point network; it is copied, and not trained.
        share: weight of the distillation loss, 0 to 1; the weight of the label loss is 1 - share.
        recipe: determines the teacher's precision, and whether it is compiled.
    """

    def __init__(
        self, teacher: MaskedNetwork, temperature: float, share: float, recipe: TrainingOptions, device: torch.device
    ) -> None:
        network = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        network.soft_mask = 0.0
        self.teacher = torch.compile(network) if recipe.compile else network
        self.features = bool(teacher.config.features)
        self.temperature, self.share = temperature, share
        dtype = getattr(torch, recipe.dtype_on(device.type))
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Images (B, C, H, W), output (B, ...) and targets (B, classes) -> a scalar."""
        with torch.no_grad(), self.autocast:
            expected = self.teacher(images).float()
        if self.features:
            return (logits - expected).square().sum() / expected.square().sum()
        student, teacher = ((x / self.temperature).log_softmax(1) for x in (logits, expected))
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2
        return self.share * soft + (1 - self.share) * F.cross_entropy(logits, targets)


def make_scales_parameters(model: MaskedNetwork) -> None:
    """Makes every scale of a quantized network a parameter, in place."""
    for _, quantizer in quantizers(model):
        quantizer.make_scale_parameter()


def make_scales_buffers(model: MaskedNetwork) -> None:
    """Makes every scale of a trained network a buffer again, in place, so that the network can be exported."""
    for _, quantizer in quantizers(model):
        quantizer.make_scale_buffer()


def scale_groups(scale_rate: float) -> Groups:
    """Returns a function that makes parameter groups, with a group of its own for each scale tensor.

    Scales have no weight decay, and their learning rate is the network's times ``scale_rate`` times the tensor's
    calibrated mean: Adam changes a value by about its learning rate whatever the size of the gradient, but a network's
    scales differ by orders of magnitude. (LSQ's gradient scale cancels out in Adam, and matters for SGD only.)
    """

    def groups(recipe: TrainingOptions, model: MaskedNetwork) -> list[dict[str, Any]]:
        scales = [each.scale for _, each in quantizers(model) if isinstance(each.scale, nn.Parameter)]
        own = {id(scale) for scale in scales}
        others = parameter_groups(recipe, model)
        for group in others:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        # The scales come first, because the log shows the last group's learning rate.
        return [
            {"params": [scale], "weight_decay": 0.0, "lr_scale": scale_rate * float(scale.detach().mean())}
            for scale in scales
        ] + [group for group in others if group["params"]]

    return groups
