"""A class for every pixel: UperNet (Xiao et al., arXiv 1807.10221) on an iLLaMA, as the paper has it on ADE20K.

Of that experiment the paper says that it takes UperNet at 512 pixels, AdamW, a learning rate of 6e-5 and a weight decay
of 0.01, and no more (arXiv 2404.06773). How a network of one resolution feeds a head that wants four is taken from
those who did it before: four evenly spaced blocks, brought to 4, 2, 1 and 1/2 times their resolution (BEiT, arXiv
2106.08254, and MAE, arXiv 2111.06377). The decoder is segmentation_models_pytorch's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from illama.bundle import WEIGHTS, Manifest
from illama.checkpoints.load import Checkpoint, check_state, read_preprocessing, read_state
from illama.errors import UserError
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA, Linear
from illama.models.norms import make_norm

LEVELS = 4


@dataclass(frozen=True)
class SegmentationConfig(ModelConfig):
    """The shape of an iLLaMA and of the UperNet on it.

    Attributes:
        num_classes: classes of a pixel.
        decoder_channels: of every feature map in the decoder.

    Raises:
        UserError: as for a :class:`ModelConfig`, for too few blocks, or for an image of too few patches.
    """

    image_size: int = 512
    num_classes: int = 150
    decoder_channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < LEVELS or self.patches < 4:
            raise UserError(f"segmentation needs {LEVELS} blocks and 2 x 2 patches or more")

    @property
    def side(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks whose outputs are read."""
        return tuple(self.depth * (level + 1) // LEVELS - 1 for level in range(LEVELS))


class UperNet(ILLaMA):
    """Images (B, C, H, W), float, to logits (B, num_classes, H, W); H = W = ``config.image_size``.

    The parameters of the :class:`ILLaMA` keep their names, so that its checkpoints start it
    (:func:`illama.checkpoints.load.initialise_from`). All patches of four blocks are read; ``readout_only`` has no say:
    every block computes every token. The class token stays last, where the blocks were trained to have it: no patch
    sees its value, but every softmax counts it (docs/attention-mask.md).

    Args:
        drop_path, dropout: see :class:`ILLaMA`; none in the decoder.
    """

    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig, drop_path: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__(config, drop_path, dropout)
        width, channels = config.width, config.decoder_channels
        self.neck = nn.ModuleList(
            [
                nn.Sequential(Doubled(width), make_norm(config), nn.GELU(), Doubled(width)),
                Doubled(width),
                nn.Identity(),
                nn.Identity(),
            ]
        )
        self.decoder = _make_decoder(config)
        self.head = nn.Conv2d(channels, config.num_classes, 1)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Maps (B, width, h, w) of four blocks after the final norm, 4, 2, 1 and 1/2 times the patches' grid."""
        config, x = self.config, self.embed(images)
        mask = self.attention_mask(config.mask, self.causal)
        start = 0 if config.class_token == "last" else 1
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, mask, self.rotation)
            if index in config.taps:
                grid = self.norm(x[:, start : start + config.patches]).unflatten(1, (config.side, config.side))
                maps.append(self.neck[len(maps)](grid).permute(0, 3, 1, 2))
        return [*maps[:-1], F.max_pool2d(maps[-1], 2)]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes, H, W)."""
        logits = self.head(self.decoder([None, None, *self.pyramid(images)]))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _make_decoder(config: SegmentationConfig) -> nn.Module:
    """segmentation_models_pytorch's, with two of its parts replaced by equal ones that export well."""
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as missing:
        raise UserError("segmentation needs one more package: pip install -e '.[segmentation]'") from missing
    # Its first two levels are an image's and half of it, which it does not use.
    decoder: nn.Module = UPerNetDecoder((0, 0, *[config.width] * LEVELS), decoder_channels=config.decoder_channels)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.ReLU):
            module.inplace = False  # there is no such thing in an exported graph
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            decoder.set_submodule(name, Pooled(config.side // 2, int(module.output_size)))  # type: ignore[arg-type]
    return decoder


class Doubled(nn.Module):
    """A transposed convolution of 2 x 2 with stride 2, as the Linear that it is: those can be quantized."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, width) -> (B, 2H, 2W, width)."""
        x = self.linear(x).unflatten(-1, (2, 2, -1))  # each pixel's rows and columns
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


class Pooled(nn.Module):
    """``nn.AdaptiveAvgPool2d(bins)`` of maps of ``side`` x ``side``, as two products, which every runtime has.

    The exporter writes the original as a dozen gathers wherever the side is no multiple of the bins.
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
    """A copy in evaluation mode whose convolutions hold the batch norms after them: what is quantized and exported."""
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
    """The network of a bundle that ``illama/train_segmentation.py`` wrote; UserError for anything else."""
    manifest, weights = Manifest.read(bundle), bundle / WEIGHTS
    if "decoder_channels" not in manifest.config:
        raise UserError(f"{bundle} holds no segmentation network: make one with python illama/train_segmentation.py")
    config = SegmentationConfig.from_dict(manifest.config)
    state = read_state(weights)
    with torch.device("meta"):  # shapes without memory or initial values
        expected = UperNet(config).state_dict()
    check_state(expected, state, weights, "the config")
    model = UperNet(config)
    model.load_state_dict(state)
    return SegmentationCheckpoint(model.eval(), read_preprocessing(manifest), tuple(manifest.classes), weights)
