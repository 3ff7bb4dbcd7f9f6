"""Writes an iLLaMA's weights with their config, and loads them from a bundle, a .safetensors or a .pth file.

Weights of timm's ViTs are loaded by :mod:`illama.checkpoints.timm_checkpoint`.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from illama.bundle import MANIFEST, PACKED_WEIGHTS, TORCHAO, WEIGHTS, sha256, weights_of
from illama.checkpoints.tensor_files import PLAIN, check_config, read_metadata, read_tensors
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Manifest
from illama.models.attention import MaskedNetwork
from illama.models.config import ClassToken, ModelConfig
from illama.models.illama import ILLaMA
from illama.structured_files import parse_json

CONFIG_METADATA = "illama_config"  # key in the metadata of a .safetensors file; the value is JSON
PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
Network = TypeVar("Network", bound=MaskedNetwork, covariant=True)
_NOT_IN_SHAPES = ("mask", "class_token", "position", "class_sees_all", "global_pool")


@dataclass(frozen=True)
class Checkpoint(Generic[Network]):
    """A trained network with its preprocessing and class names.

    Attributes:
        model: the network, in evaluation mode, on the CPU, in float32.
        preprocessing: preprocessing used in training, at the model's image size; None if the file has none.
        classes: class names in the order of the logits; empty if the file has none.
        weights: path to the file of the weights.
        other_files: paths to its other files, such as a config and shards.
    """

    model: Network
    preprocessing: Preprocessing | None
    classes: tuple[str, ...]
    weights: Path
    other_files: tuple[Path, ...] = ()

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of each of its files, by path; that of the weights first."""
        return {str(path): sha256(path) for path in (self.weights, *self.other_files)}


ILLaMACheckpoint = Checkpoint[ILLaMA]


@dataclass(frozen=True)
class _Stored:
    """The checked content of a file: a finite float32 state dict that matches the config."""

    state: dict[str, Tensor]
    config: ModelConfig
    preprocessing: Preprocessing | None
    classes: tuple[str, ...]
    weights: Path


def load_checkpoint(path: Path, config: ModelConfig | None = None, image_size: int | None = None) -> ILLaMACheckpoint:
    """Loads a bundle, a .safetensors file, or a .pth file of the released code (key ``model``).

    A bundle contains its config, and so does a file of :func:`write_weights`. For any other .safetensors file, the
    config is inferred from the shapes, assuming a head dimension of 64 and the released code's mask and positions; if
    that is wrong, pass ``config``. A .pth file is assumed to be a released one, with the released mask and layout.

    Args:
        config: expected config; needed only if the file has none and the inferred one would be wrong.
        image_size: side length of the input in pixels, a multiple of the patch size. Position embeddings are
            interpolated (:func:`resize_positions`), and the preprocessing is adapted. Defaults to the file's own.

    Raises:
        UserError: the file is missing or truncated, has values that are not finite, has another config, belongs
            to another network, or is a pickle with more than tensors.
    """
    stored = _read(Path(path), config)
    if image_size is not None:
        stored = _resize(stored, image_size)
    model = ILLaMA(stored.config)
    model.load_state_dict(stored.state)
    return ILLaMACheckpoint(model.eval(), stored.preprocessing, stored.classes, stored.weights)


def load_network(path: Path) -> MaskedNetwork:
    """Loads the network of a bundle or of one of its files, in evaluation mode, including files of ``quant``.

    Raises:
        UserError: the file is missing or damaged.
    """
    if path.name == TORCHAO:  # its reader is named by a string, since its package depends on this one
        reader: Any = importlib.import_module("quant.quantizers.torchao_backend")
        return cast(MaskedNetwork, reader.load_torchao(path.parent))
    return load_checkpoint(path.parent if path.name in (WEIGHTS, PACKED_WEIGHTS) else path).model


def initialize_from(model: ILLaMA, path: Path, *, new_head: bool) -> list[str]:
    """Loads a checkpoint's weights into ``model`` for fine-tuning; returns the names of parameters that are not loaded.

    The image size (position embeddings are interpolated), the color channels and, with ``new_head``, the classes may
    differ from the checkpoint's. A patch kernel of 1 channel is divided among 3, and one of 3 is summed into 1, so that
    gray images give the same result.

    Args:
        path: path to anything that :func:`load_checkpoint` accepts.
        new_head: whether to keep the head of ``model`` instead of loading the checkpoint's.

    Raises:
        UserError: see :func:`load_checkpoint`; also if the configs differ in anything else.
    """
    stored = _read(Path(path))
    must_agree = stored.config.to_dict().keys() - {"image_size", "in_channels", "num_classes" if new_head else ""}
    differences = _differences(stored.config, model.config, must_agree)
    if differences:
        hint = "; different classes need --new-head" if differences.startswith("num_classes") else ""
        raise UserError(f"{path} cannot initialize this network: it has {differences}{hint}")
    state = dict(_resize(stored, model.config.image_size).state)
    state[PATCHES] = _match_channels(state[PATCHES], model.config.in_channels, path)
    left = [name for name in model.state_dict() if new_head and name.startswith("head.")]
    model.load_state_dict({name: value for name, value in state.items() if name not in left}, strict=False)
    return left


def write_weights(state: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Writes a state dict as .safetensors with its config, so that it can be loaded without its bundle.

    The same weights and config give the same bytes.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # Only one key, since safetensors writes several keys in no fixed order.
    content = safetensors.torch.save(tensors, {CONFIG_METADATA: json.dumps(config.to_dict())})
    path.write_bytes(content)


def read_config(path: Path) -> ModelConfig | None:
    """Returns the config in a .safetensors file, or None if it has none; raises UserError if it is damaged."""
    text = read_metadata(path).get(CONFIG_METADATA)
    return None if text is None else parse_json(text, ModelConfig, f"the config in {path}")


def resize_positions(table: Tensor, side: int, class_token: ClassToken = "last") -> Tensor:
    """Interpolates a position embedding to side x side patches: (1, S * S + 1, width) -> (1, side * side + 1, width).

    Bicubic, ``align_corners=False``, without antialiasing, as the released code and DeiT do before fine-tuning at
    another resolution. (timm now antialiases, which changes the kernel when enlarging, too.) The class token's row is
    not changed. If S equals ``side``, returns ``table`` itself.
    """
    at = table.shape[1] - 1 if class_token == "last" else 0
    patches, row = torch.cat([table[:, :at], table[:, at + 1 :]], dim=1), table[:, at : at + 1]
    if patches.shape[1] == side**2:
        return table
    patches = resample_abs_pos_embed(patches, [side, side], num_prefix_tokens=0, antialias=False)
    return torch.cat([patches, row] if class_token == "last" else [row, patches], dim=1)


def read_state(path: Path, dtypes: Sequence[torch.dtype] = PLAIN) -> dict[str, Tensor]:
    """Reads the state dict in a file; raises UserError as :func:`read_tensors` does, or if a value is not finite."""
    state = read_tensors(path, dtypes)
    check_finite(state, path)
    return state


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError if a value is not finite."""
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path} has NaN or infinite values in {name}: train it again or use an earlier one")


def config_from_shapes(state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """Infers the config of a released state dict: class token last, mask after the softmax, RoPE.

    Raises:
        UserError: names or shapes do not match an iLLaMA's, or the position table is missing or does not fit a square
            grid and a class token.
    """
    if {PATCHES, "blocks.0.norm1.bias", "blocks.0.mlp.fc1.bias"} <= state.keys():
        raise UserError(
            f"{path} is a timm ViT (LayerNorm, GELU), not an iLLaMA: quantize it unchanged with --model timm:NAME, or "
            "make it causal with illama.models.timm_vit.to_causal"
        )
    try:
        width, in_channels, patch_size, _ = state[PATCHES].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        num_classes = len(state["head.weight"])
    except (KeyError, ValueError, TypeError) as error:  # TypeError: a head without dimensions
        raise UserError(f"{path} is not an iLLaMA checkpoint: parameter names or shapes do not match") from error
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
    """Reads and checks a bundle or a file; raises UserError as :func:`load_checkpoint` does."""
    folder = path if path.is_dir() else path.parent
    weights = weights_of(path) if path.is_dir() else path
    in_bundle = path.is_dir() or (weights.name in (WEIGHTS, PACKED_WEIGHTS) and (folder / MANIFEST).exists())
    manifest = Manifest.read(folder) if in_bundle else None
    state = read_state(weights)
    stored = _stored_config(weights, manifest)
    if stored is not None and config is not None and config != stored:
        raise UserError(f"{path} was trained with another config: {_differences(stored, config)}")
    if stored is None and weights.suffix != ".safetensors" and config is not None:
        unlike = _differences(config_from_shapes(state, weights), config, _NOT_IN_SHAPES)
        if unlike:
            raise UserError(
                f"{weights} is a .pth file, and released ones have {unlike}: the weights would load but give wrong "
                "logits; put weights with another config into a bundle"
            )
    config = stored or config or config_from_shapes(state, weights)
    check_config(config, state, weights)
    with torch.device("meta"):  # shapes without memory or initial values
        expected = ILLaMA(config).state_dict()
    check_state(expected, state, weights, "the config")
    return _Stored(
        {name: value.float() for name, value in state.items()},
        config,
        manifest.preprocessing if manifest else None,
        manifest.classes if manifest else (),
        weights,
    )


def _stored_config(weights: Path, manifest: Manifest | None) -> ModelConfig | None:
    """Returns the config of the manifest or of the file's metadata, which must agree; None if neither has one."""
    if manifest and manifest.network != "illama":
        raise UserError(f"{weights} is of a {manifest.network} network, not of an iLLaMA: give another checkpoint")
    carried = read_config(weights) if weights.suffix == ".safetensors" else None
    if manifest is None:
        return carried
    listed = parse_json(json.dumps(manifest.config), ModelConfig, f"the config in {weights.with_name(MANIFEST)}")
    if carried is not None and carried != listed:
        differences = _differences(carried, listed)
        raise UserError(f"{weights} and its {MANIFEST} have different configs: {differences}")
    return listed


def _grid_side(state: Mapping[str, Tensor], path: Path) -> int:
    """Returns the number of patches along a side, from the rows of the position table."""
    if POSITIONS not in state:
        raise UserError(f"{path} has no position table ({POSITIONS}), which is needed to infer the image size")
    shape = tuple(state[POSITIONS].shape)
    side = math.isqrt(max(0, shape[1] - 1)) if len(shape) == 3 else 0
    if side < 1 or shape != (1, side * side + 1, shape[2]):
        raise UserError(
            f"{path} has a position table of shape {shape}, and (1, side * side + 1, width) is needed for a square "
            "grid of patches and a class token"
        )
    return side


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Raises UserError for a state dict whose names, shapes or dtypes do not match ``what``."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            raise UserError(f"{path} does not fit {what}: {name} is {'missing' if name in expected else 'unknown'}")
        if expected[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
            raise UserError(f"{path} does not fit {what}: {name} has shape {shapes}")
        if expected[name].is_floating_point() and not state[name].is_floating_point():
            raise UserError(f"{path} has {state[name].dtype} values in {name}: float weights are needed")


def _resize(stored: _Stored, image_size: int) -> _Stored:
    """Adapts the weights to another image size; shares the tensors that do not depend on it."""
    if image_size == stored.config.image_size:
        return stored
    config = replace(stored.config, image_size=image_size)
    state = dict(stored.state)
    if POSITIONS in state:
        state[POSITIONS] = resize_positions(state[POSITIONS], config.side, config.class_token)
    preprocessing = stored.preprocessing and _resize_preprocessing(stored.preprocessing, image_size)
    return replace(stored, state=state, config=config, preprocessing=preprocessing)


def _resize_preprocessing(old: Preprocessing, image_size: int) -> Preprocessing:
    """Returns a preprocessing for another image size.

    ImageNet's is computed anew. Any other keeps the ratio of resize to crop; from 384 pixels on, it has no crop.
    """
    size, old_side = (image_size, image_size), min(old.size)
    if old == replace(Preprocessing.imagenet(old_side, old.in_channels), exif=old.exif):
        return replace(old, size=size, resize=Preprocessing.imagenet(image_size).resize)
    crop = old.resize if isinstance(old.resize, int) and image_size < 384 else None
    return replace(old, size=size, resize=crop and crop * image_size // old_side)


def _match_channels(kernel: Tensor, channels: int, path: Path) -> Tensor:
    """Converts the patch kernel (width, C, P, P) to another number of color channels: 1 to 3 or 3 to 1."""
    given = kernel.shape[1]
    if given == channels:
        return kernel
    if (given, channels) == (1, 3):
        return kernel.expand(-1, 3, -1, -1) / 3
    if (given, channels) == (3, 1):
        return kernel.sum(dim=1, keepdim=True)
    raise UserError(f"{path} takes {given} color channels, not {channels}: only 1 and 3 can be converted")


def _differences(stored: ModelConfig, asked: ModelConfig, of: Collection[str] | None = None) -> str:
    """Describes the differences between two configs, in all settings or only in those named."""
    one, other = stored.to_dict(), asked.to_dict()
    names = (name for name in one if one[name] != other[name] and (of is None or name in of))
    return ", ".join(f"{name} {one[name]}, not {other[name]}" for name in names)
