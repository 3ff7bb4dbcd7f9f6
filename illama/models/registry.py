"""Registers the published sizes with timm: timm.create_model("illama_tiny", num_classes=10)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.models.config import SIZES, ModelConfig
from illama.models.illama import ILLaMA

_TIMM_NAMES = {"image_size": "img_size", "in_channels": "in_chans", "width": "embed_dim", "heads": "num_heads"}
_OUR_NAMES = {theirs: ours for ours, theirs in _TIMM_NAMES.items()}


def pretrained_config(size: str) -> dict[str, Any]:
    """Returns what timm knows of a model besides its network, with :meth:`Preprocessing.imagenet`."""
    config = ModelConfig.preset(size)
    images = Preprocessing.imagenet(config.image_size, config.in_channels)
    return {
        "num_classes": config.num_classes,
        "input_size": (config.in_channels, *config.size),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": config.image_size / images.resize if isinstance(images.resize, int) else 1.0,
        "interpolation": images.interpolation,
        "mean": images.mean,
        "std": images.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({f"illama_{size}": pretrained_config(size) for size in SIZES})  # read by timm


def _build(
    size: str,
    drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> ILLaMA:
    """Returns a network by timm's arguments, or by fields of :class:`ModelConfig`; TypeError for others."""
    given = {_OUR_NAMES.get(name, name): value for name, value in overrides.items()}
    sides = given.get("image_size")
    if isinstance(sides, list | tuple) and len(set(sides)) == 1:
        given["image_size"] = sides[0]
    config = ModelConfig.preset(size, **given)
    with torch.device(device or torch.get_default_device()):
        return ILLaMA(config, drop_path_rate, proj_drop_rate, drop_rate).to(dtype=dtype)


def create_for_timm(size: str, name: str, pretrained: bool, **options: Any) -> Any:
    """Returns a network as timm's factory does, or, with ``features_only``, one that returns feature maps."""
    if pretrained:
        raise UserError("pretrained weights are not downloaded: load released weights with load_checkpoint(PATH)")
    if options.get("feature_cls", "getter") != "getter":
        raise UserError("feature maps are computed by forward_intermediates alone: leave out feature_cls")
    # timm adds defaults under its own names, which must not meet others for the same field.
    if twice := [name for name, theirs in _TIMM_NAMES.items() if name in options and theirs in options]:
        raise TypeError(f"{twice[0]} and {_TIMM_NAMES[twice[0]]} are the same: give one")
    given = {_TIMM_NAMES.get(name, name): value for name, value in options.items()}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(_build, name, False, feature_cfg=features, size=size, **given)


def _register(size: str) -> None:
    def create(pretrained: bool = False, **options: Any) -> Any:
        return create_for_timm(size, f"illama_{size}", pretrained, **options)

    create.__name__, create.__doc__ = f"illama_{size}", f"iLLaMA-{size} (:meth:`illama.ModelConfig.preset`)."
    register_model(create)


for _size in SIZES:
    _register(_size)
