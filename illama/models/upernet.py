"""Semantic segmentation: UperNet (Xiao et al., arXiv 1807.10221) on an iLLaMA, as in the paper's ADE20K experiment.

The paper (arXiv 2404.06773) specifies UperNet at 512 pixels, AdamW, a learning rate of 6e-5 and a weight decay of 0.01,
and nothing else. The four resolutions that UperNet needs are made as in BEiT (arXiv 2106.08254) and MAE (arXiv
2111.06377): the outputs of four evenly spaced blocks are resampled to 4, 2, 1 and 1/2 times their resolution. The
decoder is that of segmentation_models_pytorch.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from illama.bundle import WEIGHTS, NetworkKind
from illama.checkpoints.load import Checkpoint, check_state, read_state
from illama.checkpoints.tensor_files import check_config
from illama.errors import UserError
from illama.manifest import Manifest
from illama.models.config import Classes, ModelConfig, Pool, Size
from illama.models.illama import ILLaMA, Linear
from illama.models.norms import make_norm
from illama.structured_files import parse_json

LEVELS = 4


@dataclass(frozen=True)
class SegmentationConfig(ModelConfig):
    """Configuration of a UperNet and its iLLaMA.

    Attributes:
        image_size: side length of the square input in pixels.
        num_classes: number of classes.
        decoder_channels: number of channels of every feature map in the decoder.

    Raises:
        UserError: see :class:`ModelConfig`; also if there are too few blocks or patches.
    """

    kind: ClassVar[NetworkKind] = "segmentation"
    image_size: Size = 512
    num_classes: Classes = 150
    decoder_channels: Size = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < LEVELS or self.patches < 4:
            raise UserError(f"segmentation needs {LEVELS} blocks and 2 x 2 patches or more")
        if self.global_pool != "token":
            raise UserError("segmentation pools nothing: leave out global_pool")

    @property
    def taps(self) -> tuple[int, ...]:
        """Indices of the blocks whose outputs go to the decoder."""
        return tuple(self.depth * (level + 1) // LEVELS - 1 for level in range(LEVELS))


class UperNet(ILLaMA):
    """Maps float images (B, C, H, W) to logits (B, num_classes, H, W), where H = W = ``config.image_size``.

    The parameters of the :class:`ILLaMA` keep their names, so that its checkpoints can initialize them
    (:func:`illama.checkpoints.load.initialize_from`). Every block computes every token; ``readout_only`` has no effect.
    The class token stays last, as when the blocks were trained: no patch receives its value, but it is part of every
    softmax (docs/attention-mask.md).

    Args:
        drop_path: see :class:`ILLaMA`.
        dropout: see :class:`ILLaMA`; the decoder has none.
    """

    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig, drop_path: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__(config, drop_path, dropout)
        width, channels = config.width, config.decoder_channels
        self.neck = nn.ModuleList(
            [
                nn.Sequential(TransposedConv(width), make_norm(config), nn.GELU(), TransposedConv(width)),
                TransposedConv(width),
                nn.Identity(),
                nn.Identity(),
            ]
        )
        self.decoder = _make_decoder(config)
        self.head = nn.Conv2d(channels, config.num_classes, 1)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Returns four feature maps (B, width, h, w) at 4, 2, 1 and 1/2 times the resolution of the patches."""
        found = self.forward_intermediates(
            images, list(self.config.taps), norm=True, output_fmt="NLC", intermediates_only=True
        )
        grids = [patches.unflatten(1, self.patch_embed.grid_size) for patches in found]
        maps = [part(grid).permute(0, 3, 1, 2) for part, grid in zip(self.neck, grids, strict=True)]
        return [*maps[:-1], F.max_pool2d(maps[-1], 2)]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise UserError("a segmentation network has a decoder instead of a head for tokens: call the network")

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        raise UserError("the classes of a segmentation network belong to its decoder: make a new network")

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes, H, W)."""
        logits = self.head(self.decoder([None, None, *self.pyramid(images)]))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _make_decoder(config: SegmentationConfig) -> nn.Module:
    """Returns segmentation_models_pytorch's decoder, with two modules replaced by equivalent ones for export."""
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as missing:
        raise UserError("segmentation needs one more package: pip install -e '.[segmentation]'") from missing
    # The decoder's first two levels, the image and half of its resolution, are not used.
    decoder: nn.Module = UPerNetDecoder((0, 0, *[config.width] * LEVELS), decoder_channels=config.decoder_channels)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.ReLU):
            module.inplace = False  # exported graphs have no in-place operators
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            decoder.set_submodule(name, AdaptiveAvgPool(config.side // 2, int(module.output_size)))  # type: ignore[arg-type]
    return decoder


class TransposedConv(nn.Module):
    """A 2 x 2 transposed convolution with stride 2, computed by an equivalent Linear, which can be quantized."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, width) -> (B, 2H, 2W, width)."""
        x = self.linear(x).unflatten(-1, (2, 2, -1))  # the 2 x 2 pixels that replace each pixel
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


class AdaptiveAvgPool(nn.Module):
    """``nn.AdaptiveAvgPool2d(bins)`` of maps of ``side`` x ``side``, as two matrix products.

    If the side is not a multiple of the bins, the exporter writes PyTorch's module as a dozen Gather operators.
    """

    shares: Tensor

    def __init__(self, side: int, bins: int) -> None:
        super().__init__()
        shares = torch.zeros(bins, side)
        for index in range(bins):
            first, end = index * side // bins, -(-(index + 1) * side // bins)
            shares[index, first:end] = 1 / (end - first)
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, side, side) -> (B, C, bins, bins)."""
        return self.shares @ x @ self.shares.t()


def fold_batch_norms(model: UperNet) -> UperNet:
    """Returns a copy in evaluation mode, with batch norms folded into the convolutions, for quantization and export."""
    folded = copy.deepcopy(model).eval()
    for module in folded.decoder.modules():
        if isinstance(module, nn.Sequential):
            for index in range(len(module) - 1):
                convolution, norm = module[index], module[index + 1]
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[index], module[index + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
    return folded


@dataclass(frozen=True)
class SegmentationCheckpoint(Checkpoint):
    """A checkpoint whose network is a :class:`UperNet`."""

    model: UperNet


def load_segmentation(bundle: Path) -> SegmentationCheckpoint:
    """Loads a bundle written by ``illama/train_segmentation.py``; raises UserError for anything else."""
    manifest, weights = Manifest.read(bundle), bundle / WEIGHTS
    if manifest.network != "segmentation":
        raise UserError(f"{bundle} has no segmentation network: train one with python illama/train_segmentation.py")
    config = parse_json(json.dumps(manifest.config), SegmentationConfig, f"the config in {bundle}")
    state = read_state(weights)
    check_config(config, state, weights)
    with torch.device("meta"):  # shapes without memory or initial values
        expected = UperNet(config).state_dict()
    check_state(expected, state, weights, "the config")
    model = UperNet(config)
    model.load_state_dict(state)
    return SegmentationCheckpoint(model.eval(), manifest.preprocessing, manifest.classes, weights)
