"""Registers the published sizes with timm: timm.create_model("illama_tiny", num_classes=10)."""

from __future__ import annotations

from typing import Any

from timm.models import register_model

from illama.errors import UserError
from illama.models.config import SIZES, ModelConfig
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


def _register(size: str) -> None:
    def create(pretrained: bool = False, **options: Any) -> ILLaMA:
        return _create(size, pretrained, **options)

    create.__name__, create.__doc__ = f"illama_{size}", f"iLLaMA-{size} (:meth:`illama.ModelConfig.preset`)."
    register_model(create)


for _size in SIZES:
    _register(_size)
