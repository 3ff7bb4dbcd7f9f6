"""The ResNet in front of timm's hybrid ViTs (``vit_*_r*``), with plain convolutions.

Its convolutions standardize their weights in every call, and pad by what the image size requires. Once the network is
trained and its image size fixed, both are constants; with them, layers that only know ``nn.Conv2d`` can take over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, StdConv2d
from timm.layers.padding import get_same_padding
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from illama.errors import UserError
from illama.models.hooks import input_hooks


@torch.no_grad()
def fold_hybrid(vit: VisionTransformer) -> None:
    """Replaces the convolutions and the poolings of a hybrid's ResNet by plain ones with the same results, in place.

    Raises:
        UserError: the patches come from another convolutional network.
    """
    embed: Any = vit.patch_embed
    if type(embed) is not HybridEmbed:
        return
    if not isinstance(embed.proj, nn.Conv2d):
        kind = type(embed.backbone).__name__
        raise UserError(f"its patches come from a {kind}: only ResNets (vit_*_r*) are supported; give a plain ViT")
    sizes = _input_sizes(embed)
    for name, module in list(embed.backbone.named_modules()):
        if type(module) in (StdConv2d, StdConv2dSame, MaxPool2dSame):
            embed.backbone.set_submodule(name, _plain(module, sizes[name]))
        elif isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
            raise UserError(f"its patches come from a network with a {type(module).__name__}: give a plain ViT")


def _input_sizes(embed: Any) -> dict[str, tuple[int, int]]:
    """Returns the (height, width) of the input of every module of the ResNet, by running it once."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str, inputs: Any) -> None:
        sizes[name] = tuple(inputs[0].shape[-2:])

    parameter = next(embed.backbone.parameters())
    images = torch.zeros(1, embed.in_chans, *embed.img_size, dtype=parameter.dtype, device=parameter.device)
    with input_hooks(embed.backbone, dict(embed.backbone.named_modules()), note):
        embed.backbone(images)
    return sizes


def _plain(module: Any, size: tuple[int, int]) -> nn.Module:
    """Returns a convolution or a pooling without padding by size and without standardization."""
    high, wide = 0, 0
    if isinstance(module, MaxPool2dSame) or getattr(module, "same_pad", False):
        high, wide = map(get_same_padding, size, module.kernel_size, module.stride, module.dilation)
    pads = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
    if isinstance(module, MaxPool2dSame):  # padded with the least value that half precision has
        new: Any = nn.MaxPool2d(module.kernel_size, module.stride, dilation=module.dilation)
        return nn.Sequential(nn.ConstantPad2d(pads, -65504.0), new) if any(pads) else new
    with torch.device("meta"):
        same = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        new = nn.Conv2d(**{name: getattr(module, name) for name in same})
    flat = module.weight.reshape(1, module.out_channels, -1)
    weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=module.eps).reshape_as(module.weight)
    new.weight, new.bias = nn.Parameter(weight), module.bias
    return nn.Sequential(nn.ZeroPad2d(pads), new) if any(pads) else new
