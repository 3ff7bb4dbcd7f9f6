"""Weights out with their config, and in from a bundle, a .safetensors or a .pth file, checked before use.

Networks are iLLaMAs here; timm's ViTs are :mod:`illama.checkpoints.timm_checkpoint`'s.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from illama.bundle import MANIFEST, TORCHAO, WEIGHTS, Manifest
from illama.data.datasets import Preprocessing
from illama.errors import UserError
from illama.models.attention import SoftMasked
from illama.models.config import ClassToken, ModelConfig
from illama.models.illama import ILLaMA

CONFIG_METADATA = "illama_config"  # key in the metadata of a .safetensors file; the value is JSON
PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
_NOT_IN_SHAPES = ("mask", "class_token", "position", "class_sees_all")
# Files that another package reads: name -> "module:function" of one that takes the bundle's folder. By name, so that
# this package imports none that stands on it.
_READERS = {TORCHAO: "quant.quantizers.torchao_backend:load_torchao"}


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what it needs to be used.

    Attributes:
        model: in evaluation mode, on the CPU, float32.
        preprocessing: the transform it was trained with, brought to the model's image size; None where the
            file does not say.
        classes: names in the order of the logits; empty where the file does not say.
        weights: the file that the weights came from.
    """

    model: SoftMasked
    preprocessing: Preprocessing | None
    classes: tuple[str, ...]
    weights: Path


@dataclass(frozen=True)
class ILLaMACheckpoint(Checkpoint):
    """A checkpoint whose network is an iLLaMA."""

    model: ILLaMA


@dataclass(frozen=True)
class _Stored:
    """What a file says, checked: the state is float32, finite and fits the config."""

    state: dict[str, Tensor]
    config: ModelConfig
    preprocessing: Preprocessing | None
    classes: tuple[str, ...]
    weights: Path


def load_checkpoint(path: Path, config: ModelConfig | None = None, image_size: int | None = None) -> ILLaMACheckpoint:
    """Load a bundle folder, a .safetensors file, or a .pth of the released code (key ``model``).

    A bundle names its config, and so does a file of :func:`write_weights`. For any other .safetensors the
    config is read off the shapes, with 64-wide heads and the released code's mask and positions; pass ``config``
    where that is wrong. A .pth is taken for a released one, whose mask and layout are never in doubt.

    Args:
        config: what the file must be; see above for where it says more than the file does.
        image_size: side length in pixels to run at, a multiple of the patch size. Positions are interpolated
            (:func:`resize_positions`) and the preprocessing follows; None keeps the file's own size.

    Raises:
        UserError: missing, truncated, not finite, of another config or another network, or a pickle that holds
            more than tensors.
    """
    stored = _read(Path(path), config)
    if image_size is not None:
        stored = _resize(stored, image_size)
    model = ILLaMA(stored.config)
    model.load_state_dict(stored.state)
    return ILLaMACheckpoint(model.eval(), stored.preprocessing, stored.classes, stored.weights)


def load_network(path: Path) -> SoftMasked:
    """The network of a bundle or a file of one, whatever package wrote that file; in evaluation mode.

    Raises:
        UserError: the file is missing or damaged.
    """
    if path.name in _READERS:
        module, _, function = _READERS[path.name].partition(":")
        reader: Callable[[Path], SoftMasked] = getattr(importlib.import_module(module), function)
        return reader(path.parent)
    return load_checkpoint(path.parent if path.name == WEIGHTS else path).model


def initialise_from(model: ILLaMA, path: Path, *, new_head: bool) -> list[str]:
    """Start ``model`` from a checkpoint's weights, for fine-tuning; the names of what keeps its initial values.

    Image size (positions are interpolated), colour channels and, with ``new_head``, classes may differ from the
    checkpoint's. A kernel for 1 channel is spread over 3 so that a grey image gives what it gave, and one for 3 is
    summed into 1 likewise.

    Args:
        path: anything that :func:`load_checkpoint` takes.
        new_head: leave the head as it is; otherwise it is loaded too.

    Raises:
        UserError: as :func:`load_checkpoint`, and for any other difference of the two configs.
    """
    stored = _read(Path(path))
    must_agree = stored.config.to_dict().keys() - {"image_size", "in_channels", "num_classes" if new_head else ""}
    differences = _differences(stored.config, model.config, must_agree)
    if differences:
        hint = "; other classes need a new head" if differences.startswith("num_classes") else ""
        raise UserError(f"{path} cannot start this network: it has {differences}{hint}")
    state = dict(_resize(stored, model.config.image_size).state)
    state[PATCHES] = _match_channels(state[PATCHES], model.config.in_channels, path)
    left = [name for name in model.state_dict() if new_head and name.startswith("head.")]
    model.load_state_dict({name: value for name, value in state.items() if name not in left}, strict=False)
    return left


def write_weights(state: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Write a state dict as .safetensors that carries its config, so that it can be loaded outside its bundle.

    The same weights and config give the same bytes.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # One key only: safetensors writes several in no fixed order.
    content = safetensors.torch.save(tensors, {CONFIG_METADATA: json.dumps(config.to_dict())})
    path.write_bytes(content)


def read_config(path: Path) -> ModelConfig | None:
    """The config that a .safetensors file carries; None for one without. UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(CONFIG_METADATA)
        return None if text is None else ModelConfig.from_dict(json.loads(text))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path) from error
    except UserError as error:
        raise UserError(f"{path} carries a config that this version cannot use: {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} carries a damaged config: write the file again") from error


def resize_positions(table: Tensor, side: int, class_token: ClassToken = "last") -> Tensor:
    """Position embedding for a grid of side x side patches: (1, S * S + 1, width) -> (1, side * side + 1, width).

    Bicubic, ``align_corners=False``, without antialiasing, for that is what the released code and DeiT did before
    they fine-tuned at another resolution. (timm now antialiases, which also changes the kernel when enlarging.)
    The class token's row is kept as it is, and the table itself is returned where S is ``side`` already.
    """
    at = table.shape[1] - 1 if class_token == "last" else 0
    patches, row = torch.cat([table[:, :at], table[:, at + 1 :]], dim=1), table[:, at : at + 1]
    old_side = math.isqrt(patches.shape[1])
    if old_side == side:
        return table
    grid = patches.unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([patches, row] if class_token == "last" else [row, patches], dim=1)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without running any code that the file may hold; UserError if unusable."""
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            # The released code saves its command line beside the weights; a Namespace holds data only.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
            if {"model", "average", "step"} <= content.keys():
                raise UserError(f"{path} is a training run's state, without its config: take the run's bundle")
            state = content.get("model", content.get("state_dict", content))  # ours and DeiT's, timm's
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, and it was not run: save its state dict alone") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, AttributeError, LookupError, OSError) as error:
        raise _unreadable(path) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict of tensors")
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path} has NaN or infinite values in {name}: train it again or take an earlier one")
    return dict(state)


def config_from_shapes(state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """The config that a released state dict implies: class token last, mask after the softmax, RoPE.

    Raises:
        UserError: another network's names or shapes, or a position table that is missing or not of a square
            grid and a class token.
    """
    _refuse_timm_vit(state, path)
    try:
        width, in_channels, patch_size, _ = state[PATCHES].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        num_classes = len(state["head.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not an iLLaMA checkpoint: its parameter names or shapes are others'") from error
    return ModelConfig(
        image_size=_grid_side(state, path) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        width=width,
        depth=depth,
        heads=max(1, width // 64),
        num_classes=num_classes,
    )


def _read(path: Path, config: ModelConfig | None = None) -> _Stored:
    """Everything that a bundle or a file says, checked; UserError as :func:`load_checkpoint`."""
    folder = path if path.is_dir() else path.parent
    weights = path / WEIGHTS if path.is_dir() else path
    in_bundle = path.is_dir() or (weights.name == WEIGHTS and (folder / MANIFEST).exists())
    manifest = Manifest.read(folder) if in_bundle else None
    state = read_state(weights)
    stored = _stored_config(weights, manifest)
    if stored is not None and config is not None and config != stored:
        raise UserError(f"{path} was trained with another config: {_differences(stored, config)}")
    if stored is None and weights.suffix != ".safetensors" and config is not None:
        _refuse_unreleased(config, config_from_shapes(state, weights), weights)
    config = stored or config or config_from_shapes(state, weights)
    with torch.device("meta"):  # shapes without memory or initial values
        expected = ILLaMA(config).state_dict()
    check_state(expected, state, weights, "the config")
    return _Stored(
        {name: value.float() for name, value in state.items()},
        config,
        read_preprocessing(manifest) if manifest else None,
        tuple(manifest.classes) if manifest else (),
        weights,
    )


def _stored_config(weights: Path, manifest: Manifest | None) -> ModelConfig | None:
    """The config in the manifest or in the file's metadata, which must agree; None where neither names one."""
    carried = read_config(weights) if weights.suffix == ".safetensors" else None
    if manifest is None:
        return carried
    listed = ModelConfig.from_dict(manifest.config)
    if carried is not None and carried != listed:
        differences = _differences(carried, listed)
        raise UserError(f"{weights} and the {MANIFEST} beside it name different configs: {differences}")
    return listed


def _refuse_unreleased(asked: ModelConfig, released: ModelConfig, path: Path) -> None:
    """Refuse what no shape would betray."""
    differences = _differences(released, asked, _NOT_IN_SHAPES)
    if differences:
        raise UserError(
            f"{path} is a .pth, and released ones have {differences}: the weights would load and silently give wrong "
            "logits; weights trained otherwise belong in a bundle, which names its config"
        )


def _refuse_timm_vit(state: Mapping[str, Tensor], path: Path) -> None:
    if {PATCHES, "blocks.0.norm1.bias", "blocks.0.mlp.fc1.bias"} <= state.keys():
        raise UserError(
            f"{path} holds a ViT as timm names it (LayerNorm, GELU), not an iLLaMA: "
            "quantize it as it is with --model timm:NAME, or make it causal with illama.models.timm_vit.to_causal"
        )


def _grid_side(state: Mapping[str, Tensor], path: Path) -> int:
    """Patches along a side, from the rows of the position table."""
    if POSITIONS not in state:
        raise UserError(f"{path} has no position table ({POSITIONS}), and its image size cannot be told without one")
    shape = tuple(state[POSITIONS].shape)
    side = math.isqrt(max(0, shape[1] - 1)) if len(shape) == 3 else 0
    if side < 1 or shape != (1, side * side + 1, shape[2]):
        raise UserError(
            f"{path} has a position table of shape {shape}, and a square grid of patches with one class token "
            "has (1, side * side + 1, width)"
        )
    return side


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Refuse a state whose names, shapes or kind of numbers are not those of ``what``."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            raise UserError(f"{path} does not fit {what}: {name} is {'missing' if name in expected else 'unknown'}")
        if expected[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
            raise UserError(f"{path} does not fit {what}: {name} has shape {shapes}")
        if expected[name].is_floating_point() and not state[name].is_floating_point():
            raise UserError(f"{path} has {state[name].dtype} values in {name}: float weights are needed")


def _resize(stored: _Stored, image_size: int) -> _Stored:
    """The same for another image size; what does not depend on it is shared."""
    if image_size == stored.config.image_size:
        return stored
    config = replace(stored.config, image_size=image_size)
    state = dict(stored.state)
    if POSITIONS in state:
        side = image_size // config.patch_size
        state[POSITIONS] = resize_positions(state[POSITIONS], side, config.class_token)
    preprocessing = stored.preprocessing and _resize_preprocessing(stored.preprocessing, image_size)
    return replace(stored, state=state, config=config, preprocessing=preprocessing)


def _resize_preprocessing(old: Preprocessing, image_size: int) -> Preprocessing:
    """ImageNet's becomes ImageNet's at the new size; any other keeps its crop's share, and warps from 384 pixels."""
    if old == replace(Preprocessing.imagenet(old.image_size, old.in_channels), exif=old.exif):
        return replace(old, image_size=image_size, resize=Preprocessing.imagenet(image_size).resize)
    crops = old.resize is not None and image_size < 384
    resize = old.resize * image_size // old.image_size if crops and old.resize else None
    return replace(old, image_size=image_size, resize=resize)


def _match_channels(kernel: Tensor, channels: int, path: Path) -> Tensor:
    """The patch kernel (width, C, P, P) for another number of colour channels: 1 to 3 or 3 to 1."""
    given = kernel.shape[1]
    if given == channels:
        return kernel
    if (given, channels) == (1, 3):
        return kernel.expand(-1, 3, -1, -1) / 3
    if (given, channels) == (3, 1):
        return kernel.sum(dim=1, keepdim=True)
    raise UserError(f"{path} takes {given} colour channels and cannot be brought to {channels}: only 1 and 3 convert")


def read_preprocessing(manifest: Manifest) -> Preprocessing:
    """The preprocessing that a manifest names; UserError if it is damaged."""
    return Preprocessing.from_dict(manifest.preprocessing)


def _differences(stored: ModelConfig, asked: ModelConfig, of: Collection[str] | None = None) -> str:
    """The settings that differ, in words; of those named, or of all."""
    one, other = stored.to_dict(), asked.to_dict()
    names = (name for name in one if one[name] != other[name] and (of is None or name in of))
    return ", ".join(f"{name} {one[name]}, not {other[name]}" for name in names)


def _unreadable(path: Path) -> UserError:
    return UserError(f"{path} is unreadable, truncated or not a checkpoint: fetch it again")
