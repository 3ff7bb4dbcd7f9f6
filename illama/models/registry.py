"""Registers the published sizes with timm: timm.create_model("illama_tiny", num_classes=10)."""

from __future__ import annotations

from typing import Any

from timm.models import register_model

from illama.errors import UserError
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA

_TIMM_NAMES = {"img_size": "image_size", "in_chans": "in_channels", "num_classes": "num_classes"}
_TIMM_INTERNAL = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _create(size: str, pretrained: bool, **options: Any) -> ILLaMA:
    if pretrained:
        raise UserError("pretrained weights are not downloaded: load released weights with load_checkpoint(PATH)")
    for name in _TIMM_INTERNAL:
        options.pop(name, None)
    drop_path = options.pop("drop_path_rate", 0.0)
    overrides = {_TIMM_NAMES.get(name, name): value for name, value in options.items()}
    return ILLaMA(ModelConfig.preset(size, **overrides), drop_path)


@register_model
def illama_nano(pretrained: bool = False, **options: Any) -> ILLaMA:
    """6 blocks, 128 wide, for 28- to 32-pixel images."""
    return _create("nano", pretrained, **options)


@register_model
def illama_tiny(pretrained: bool = False, **options: Any) -> ILLaMA:
    """12 blocks, 192 wide: 5.7 M parameters."""
    return _create("tiny", pretrained, **options)


@register_model
def illama_small(pretrained: bool = False, **options: Any) -> ILLaMA:
    """12 blocks, 384 wide: 21.9 M parameters."""
    return _create("small", pretrained, **options)


@register_model
def illama_base(pretrained: bool = False, **options: Any) -> ILLaMA:
    """12 blocks, 768 wide: 86.3 M parameters."""
    return _create("base", pretrained, **options)


@register_model
def illama_large(pretrained: bool = False, **options: Any) -> ILLaMA:
    """24 blocks, 1024 wide: 310.2 M parameters."""
    return _create("large", pretrained, **options)
