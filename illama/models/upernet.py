"""Semantic segmentation: UperNet (Xiao et al., arXiv 1807.10221) on an iLLaMA, as in the paper's ADE20K experiment, or
on a ViT of timm.

The paper (arXiv 2404.06773) specifies UperNet at 512 pixels, AdamW, a learning rate of 6e-5 and a weight decay of 0.01,
and nothing else. The four resolutions that UperNet needs are made as in BEiT (arXiv 2106.08254) and MAE (arXiv
2111.06377): the outputs of four evenly spaced blocks are resampled to 4, 2, 1 and 1/2 times their resolution. The
decoder is that of segmentation_models_pytorch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from illama.bundle import WEIGHTS, NetworkKind
from illama.checkpoints.huggingface import HUGGINGFACE, create_huggingface
from illama.checkpoints.load import Checkpoint, check_state, read_state
from illama.checkpoints.tensor_files import check_config
from illama.checkpoints.timm_checkpoint import create_timm, timm_outline
from illama.checkpoints.timm_source import check_options
from illama.errors import UserError
from illama.manifest import Manifest
from illama.models.attention import MaskedNetwork
from illama.models.config import MOST_PATCHES, Classes, ModelConfig, Pool, Size, TimmConfig
from illama.models.illama import ILLaMA, Linear
from illama.models.norms import LayerNorm, make_norm
from illama.models.timm_vit import CausalVisionTransformer, plain_vit
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
        UserError: see :class:`ModelConfig`; also for a pooling.
    """

    kind: ClassVar[NetworkKind] = "segmentation"
    image_size: Size = 512
    num_classes: Classes = 150
    decoder_channels: Size = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_pool != "token":
            raise UserError("segmentation pools nothing: leave out global_pool")


@dataclass(frozen=True)
class TimmSegmentationConfig(TimmConfig):
    """Configuration of a UperNet on a ViT of timm or transformers.

    Attributes:
        name: timm's name, or the ``model_type`` of transformers.
        options: see :class:`illama.checkpoints.timm_checkpoint.TimmCheckpoint`.
        decoder_channels: see :class:`SegmentationConfig`.
    """

    kind: ClassVar[NetworkKind] = "segmentation"
    options: Mapping[str, Any] = field(default_factory=dict)
    decoder_channels: Size = 256

    def __post_init__(self) -> None:
        if self.name not in HUGGINGFACE:
            check_options(dict(self.options), "the config")
        elif self.options.get("num_channels") != self.in_channels:
            raise UserError(f"the config has {self.in_channels} channels, and other ones in its options")
        if self.features or self.mask != "bidirectional":
            raise UserError("the config has features or a mask: a segmentation network of timm has neither")

    def create(self, drop_path: float = 0.0) -> VisionTransformer | Eva:
        """Returns timm's network with random weights; for ``drop_path``, see :class:`illama.ILLaMA`."""
        common = {"img_size": self.image_size, "num_classes": 0, "drop_path_rate": drop_path}
        if self.name in HUGGINGFACE:
            return create_huggingface(self.name, self.options, **common)
        return create_timm(self.name, **{**self.options, **common, "in_chans": self.in_channels})


class Segmenter(MaskedNetwork):
    """Base class that adds UperNet's decoder to a backbone.

    Maps float images (B, C, H, W) to logits (B, num_classes, H, W), where H = W = ``config.image_size``. The backbone's
    class token and registers are not decoded, but are part of every softmax.

    Attributes:
        grid: number of patches along both sides.
        taps: indices of the blocks whose patches are decoded.
        block_patches: a method of the backbone: (images, block indices) -> the patches after these blocks, each after
            the final norm, if it is in front of the pooling: (B, patches, width).
    """

    config: SegmentationConfig | TimmSegmentationConfig
    head: nn.Module
    grid: tuple[int, int]
    taps: tuple[int, ...]
    block_patches: Callable[[Tensor, Sequence[int]], list[Tensor]]

    def add_decoder(self, width: int, grid: tuple[int, int], depth: int, norm: nn.Module) -> None:
        """Adds the decoder of a backbone with ``grid`` patches; ``norm`` is for its channels.

        Raises:
            UserError: the backbone has too few blocks, too few or too many patches, or they are not a square.
        """
        if depth < LEVELS or not 2 <= grid[0] == grid[1] or grid[0] ** 2 > MOST_PATCHES:
            raise UserError(f"segmentation needs {LEVELS} blocks, and a square of 4 to {MOST_PATCHES} patches")
        self.grid, self.taps = grid, tuple(depth * (level + 1) // LEVELS - 1 for level in range(LEVELS))
        finest = nn.Sequential(TransposedConv(width), norm, nn.GELU(), TransposedConv(width))
        self.neck = nn.ModuleList([finest, TransposedConv(width), nn.Identity(), nn.Identity()])
        self.decoder = _make_decoder(width, self.config.decoder_channels, grid[0])
        self.head = nn.Conv2d(self.config.decoder_channels, self.config.num_classes, 1)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Returns four feature maps (B, width, h, w) at 4, 2, 1 and 1/2 times the resolution of the patches."""
        grids = [patches.unflatten(1, self.grid) for patches in self.block_patches(images, self.taps)]
        maps = [part(grid).permute(0, 3, 1, 2) for part, grid in zip(self.neck, grids, strict=True)]
        return [*maps[:-1], F.max_pool2d(maps[-1], 2)]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes, H, W)."""
        logits = self.head(self.decoder([None, None, *self.pyramid(images)]))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


class UperNet(Segmenter, ILLaMA):
    """A UperNet on an iLLaMA.

    The parameters of the :class:`ILLaMA` keep their names, so that its checkpoints can initialize them
    (:func:`illama.checkpoints.load.initialize_from`). Every block computes every token; ``readout_only`` has no effect.
    The class token stays last, as when the blocks were trained: no patch receives its value (docs/attention-mask.md).

    Args:
        drop_path: see :class:`ILLaMA`.
        dropout: see :class:`ILLaMA`; the decoder has none.
    """

    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig, drop_path: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__(config, drop_path, dropout)
        self.add_decoder(config.width, self.patch_embed.grid_size, config.depth, make_norm(config))

    def block_patches(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        return self.get_intermediate_layers(images, list(indices), norm=True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise UserError("a segmentation network has a decoder instead of a head for tokens: call the network")

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        raise UserError("the classes of a segmentation network belong to its decoder: make a new network")


class TimmUperNet(Segmenter, CausalVisionTransformer):
    """A UperNet on a ViT of timm, bidirectional as in timm; see :class:`CausalVisionTransformer`."""

    config: TimmSegmentationConfig  # type: ignore[assignment]

    def __init__(self, config: TimmSegmentationConfig, drop_path: float = 0.0) -> None:
        super().__init__(plain_vit(config.create(drop_path)), "bidirectional")
        vit: Any = self.vit
        self.config = config
        # What is not run can neither be calibrated nor trained by several processes. No patch may be dropped.
        vit.attn_pool, vit.fc_norm, vit.patch_drop = None, nn.Identity(), nn.Identity()
        if config.size[0] % (patch := vit.patch_embed.feat_ratio()):
            raise UserError(f"image_size {config.size[0]} is not a multiple of patch_size {patch}")
        self.add_decoder(vit.embed_dim, vit.patch_embed.grid_size, len(vit.blocks), LayerNorm(vit.embed_dim))


def _make_decoder(width: int, channels: int, side: int) -> nn.Module:
    """Returns segmentation_models_pytorch's decoder, with two modules replaced by equivalent ones for export."""
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as missing:
        raise UserError("segmentation needs one more package: pip install -e '.[segmentation]'") from missing
    # The decoder's first two levels, the image and half of its resolution, are not used.
    decoder: nn.Module = UPerNetDecoder((0, 0, *[width] * LEVELS), decoder_channels=channels)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.ReLU):
            module.inplace = False  # exported graphs have no in-place operators
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            decoder.set_submodule(name, AdaptiveAvgPool(side // 2, int(module.output_size)))  # type: ignore[arg-type]
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


def fold_batch_norms(model: Segmenter) -> Segmenter:
    """Returns a copy in evaluation mode, with batch norms folded into the convolutions, for quantization and export."""
    folded = copy.deepcopy(model).eval()
    for module in folded.decoder.modules():
        if isinstance(module, nn.Sequential):
            for index in range(len(module) - 1):
                convolution, norm = module[index], module[index + 1]
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[index], module[index + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
    return folded


def load_segmentation(bundle: Path) -> Checkpoint[Segmenter]:
    """Loads a bundle written by ``illama/train_segmentation.py``; raises UserError for anything else."""
    manifest, weights = Manifest.read(bundle), bundle / WEIGHTS
    if manifest.network != "segmentation":
        raise UserError(f"{bundle} has no segmentation network: train one with python illama/train_segmentation.py")
    text, where, state = json.dumps(manifest.config), f"the config in {bundle}", read_state(weights)
    if "name" in manifest.config:
        theirs = parse_json(text, TimmSegmentationConfig, where)
        if theirs.name not in HUGGINGFACE:
            timm_outline(theirs.name, theirs.options, state, weights)
        elif not 0 < theirs.options.get("num_hidden_layers", 0) <= len(state):  # each block would take time
            raise UserError(f"{where} has more blocks than {weights.name}: train it again")
        make: Callable[[], Segmenter] = partial(TimmUperNet, theirs)
    else:
        config = parse_json(text, SegmentationConfig, where)
        check_config(config, state, weights)
        make = partial(UperNet, config)
    with torch.device("meta"):  # shapes without memory or initial values
        outline = make()
    check_state(outline.state_dict(), state, weights, "the config")
    if (size := outline.config.size) != manifest.preprocessing.size:
        raise UserError(
            f"{where} is for images of {size}, the preprocessing for {manifest.preprocessing.size}: train it again"
        )
    model = make()
    model.load_state_dict(state)
    return Checkpoint(model.eval(), manifest.preprocessing, manifest.classes, weights)
