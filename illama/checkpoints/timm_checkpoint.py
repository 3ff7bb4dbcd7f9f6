"""Loads and checks a timm ViT's weights from a .safetensors or .pth file in timm's format."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from illama.bundle import MANIFEST
from illama.checkpoints.load import PATCHES, POSITIONS, Checkpoint, check_state, read_config
from illama.checkpoints.timm_source import HUB_CONFIG, TimmSource, read_timm
from illama.data.preprocessing import Preprocessing, box_of
from illama.errors import UserError
from illama.models.timm_vit import CausalVisionTransformer, to_quantizable
from illama.options import Head, Interpolation

_HEADS = ("head", "head_dist")


@dataclass(frozen=True)
class TimmCheckpoint(Checkpoint[CausalVisionTransformer]):
    """A checkpoint of a timm ViT, bidirectional as in timm.

    Attributes:
        options: options of ``timm.create_model`` besides the sizes; or the settings of a network of transformers.
    """

    options: Mapping[str, Any] = field(default_factory=dict)


def load_timm(
    name: str,
    path: Path,
    image_size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
    head: Head = "classes",
) -> TimmCheckpoint:
    """Loads a timm ViT's weights from a file in timm's format, or from a folder of timm's hub.

    The network is ``timm.create_model(name)``, with classes, channels and image size inferred from the shapes; nothing
    is downloaded. Most other options of ``create_model`` change names or shapes, so weights that need them are refused.
    A few change only the computation and cannot be noticed (such as another ``global_pool`` without its own norm),
    unless the file has its training command, or the folder its config.

    The preprocessing is that of the file or folder, or timm's for the name and its tag; images are warped where timm's
    crop mode is ``squash``. Class folders are in timm's natural order.

    Args:
        name: timm's name of the model, with or without a tag; may be empty for a folder.
        path: path to a file or a folder (:func:`illama.checkpoints.timm_source.read_timm`).
        image_size: side length of the input in pixels, or height and width, multiples of the patch size; position
            embeddings are interpolated as timm does. Defaults to the file's own, or to timm's without a position table.
        options: options of ``timm.create_model``; they replace those of the file or folder.
        head: what the network computes (:class:`illama.options.SourceOptions`).

    Raises:
        UserError: the file is missing or truncated, has values that are not finite, or belongs to another network; or
            the name is not that of a timm ViT that :func:`illama.models.timm_vit.to_quantizable` accepts.
    """
    path = Path(path)
    _refuse_ours(path, name)
    source = read_timm(path)
    name, path = _agreed_name(name, source), source.weights
    state, outputs = _take_head(source.state, head, path)
    options = {**source.options, **(options or {})}
    outline = timm_outline(name, options, state, path)
    size = _place_positions(state, outline, source.image_size, image_size, path)
    kernels = [key for key, value in outline.state_dict().items() if key.startswith("patch_embed.") and value.ndim == 4]
    first = state.get(kernels[0])  # a hybrid's is in its ResNet
    channels = first.shape[1] if first is not None and first.ndim == 4 else 3
    vit = create_timm(name, num_classes=outputs, in_chans=channels, img_size=size, **options)
    check_state(vit.state_dict(), state, path, f"timm's {name}")
    vit.load_state_dict({key: value.float() for key, value in state.items()})
    preprocessing = timm_preprocessing(vit, size, channels, source.preprocessing)
    keep_features(vit, head)
    classes = source.classes if len(source.classes) == vit.num_classes else ()
    return TimmCheckpoint(to_quantizable(vit.eval()), preprocessing, classes, path, source.other_files, options)


def _take_head(state: dict[str, Tensor], head: Head, path: Path) -> tuple[dict[str, Tensor], int]:
    """Returns the state dict, without the head if only features are wanted, and the number of the head's outputs.

    Raises:
        UserError: the head is needed, and there is none.
    """
    if head in ("none", "tokens"):
        return {name: value for name, value in state.items() if name.partition(".")[0] not in _HEADS}, 0
    if "head.weight" not in state:
        raise UserError(
            f"{path} has no classifier (head.weight): give --head none for its pooled features, or --head tokens"
        )
    return state, len(state["head.weight"])


def keep_features(vit: VisionTransformer | Eva, head: Head) -> None:
    """Makes the output of the network what ``head`` says."""
    if head == "embedding":
        vit.num_classes = 0  # its head stays
    if head == "tokens":
        if isinstance(vit, VisionTransformerDistilled):
            raise UserError("a distilled DeiT returns the mean of two tokens: give --head none")
        vit.reset_classifier(0, "")


def _agreed_name(name: str, source: TimmSource) -> str:
    """Returns timm's name of the model, from the caller or the folder; UserError if there is none, or they differ."""
    if not name and not source.name:
        raise UserError(f"{source.weights} does not say which network it is: give --model timm:NAME")
    if name and source.name and name.partition(".")[0] != source.name.partition(".")[0]:
        raise UserError(f"{source.weights.parent} is of timm's {source.name}, not of {name}: leave --model out")
    return name or source.name


def _refuse_ours(path: Path, name: str) -> None:
    """Raises UserError for an iLLaMA's weights and for any folder."""
    hint = f"timm:{name} needs a .safetensors or .pth file of timm"
    if path.is_dir() and not (path / HUB_CONFIG).exists():
        kind = "a bundle" if (path / MANIFEST).exists() else f"a folder without {HUB_CONFIG}"
        raise UserError(f"{path} is {kind}: {hint}; load a bundle without --model")
    if path.suffix == ".safetensors" and path.exists() and read_config(path) is not None:
        raise UserError(f"{path} contains an iLLaMA's weights: {hint}; load an iLLaMA without --model")


def timm_outline(
    name: str, options: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> VisionTransformer | Eva:
    """Returns timm's network ``name`` on the meta device.

    Raises:
        UserError: it is not one of timm's ViTs, or the options make it larger than its file.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('*vit*') lists them"
        raise UserError(f"timm {timm.__version__} has no model {name!r}: {hint}")
    if isinstance(depth := options.get("depth", 0), int) and depth > len(state):  # each block would take time
        raise UserError(f"{path} has {len(state)} tensors, too few for depth {depth}: correct the options")
    with torch.device("meta"):
        outline = create_timm(name, **options)
    to_quantizable(outline)  # raises UserError for networks that are not supported
    needed = sum(each.numel() for key, each in outline.named_parameters() if not key.startswith(("head", POSITIONS)))
    if needed > 2 * sum(each.numel() for each in state.values()):
        raise UserError(f"{path} holds less than half of timm's {name}: correct the name or the options")
    return outline


def create_timm(name: str, **options: Any) -> VisionTransformer | Eva:
    """Returns ``timm.create_model(name, **options)`` with random weights; raises UserError if timm cannot create it."""
    try:
        return cast(VisionTransformer | Eva, timm.create_model(name, pretrained=False, **options))
    except Exception as error:  # an unknown tag, or whatever a wrong option leads to
        raise UserError(f"timm cannot create {name}: {str(error) or 'an option does not fit'}") from error


def _place_positions(
    state: dict[str, Tensor],
    outline: VisionTransformer | Eva,
    stored: tuple[int, int] | None,
    asked: int | tuple[int, int] | None,
    path: Path,
) -> tuple[int, int]:
    """Resamples the position table to the image size that is asked for, and returns the size, (height, width).

    The table is of the size that the source states, of timm's, or of the size asked for, whichever has as many patches;
    if none has, it is square. Without a table, the size is the one asked for, stated, or timm's.

    Raises:
        UserError: the state dict has no patch embedding, or the table or the size does not fit.
    """
    if PATCHES not in state or state[PATCHES].ndim != 4:
        raise UserError(f"{path} has no {PATCHES} with four dimensions: it is not a timm ViT's state dict")
    patch = cast(int, outline.patch_embed.feat_ratio())  # a hybrid's ResNet reduces the image, too
    prefix = 0 if outline.no_embed_class else outline.num_prefix_tokens
    asked = (asked, asked) if isinstance(asked, int) else asked
    sizes = [each for each in (stored, cast(tuple[int, int], outline.patch_embed.img_size), asked) if each]
    grids = [(height // patch, width // patch) for height, width in sizes]
    old = grids[0]
    if POSITIONS in state:
        shape = tuple(state[POSITIONS].shape)
        rows = shape[1] - prefix if len(shape) == 3 and shape[0] == 1 else 0
        side = math.isqrt(max(rows, 0))
        old = next((grid for grid in [*grids, (side, side)] if math.prod(grid) == rows > 0), (0, 0))
        if old == (0, 0):
            raise UserError(
                f"{path} has a position table of shape {shape}, and (1, side * side + {prefix}, width) is needed for a "
                f"square grid of patches and {prefix} other tokens; --image-size says another one"
            )
    size = asked or (old[0] * patch, old[1] * patch)
    if size[0] % patch or size[1] % patch:
        shown = size[0] if size[0] == size[1] else size
        raise UserError(f"image_size {shown} is not a multiple of patch_size {patch}")
    grid = (size[0] // patch, size[1] // patch)
    if POSITIONS in state and grid != old:
        state[POSITIONS] = resample_abs_pos_embed(state[POSITIONS], list(grid), list(old), prefix)
    return size


def timm_preprocessing(
    vit: VisionTransformer | Eva, size: tuple[int, int], channels: int, stated: Mapping[str, Any] | None = None
) -> Preprocessing:
    """Returns timm's preprocessing for the network; for gray images, mean and std are averaged over the colors.

    Args:
        stated: values that replace those of the network's name, such as ``mean`` (C,) and ``crop_pct``.
    """
    timm_s = {**resolve_model_data_config(vit), **(stated or {})}
    mean, std = (tuple(timm_s[key]) for key in ("mean", "std"))
    if channels == 1 and len(mean) > 1:
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    resize = None if timm_s["crop_mode"] == "squash" else box_of(size, timm_s["crop_pct"])
    if (interpolation := timm_s["interpolation"]) not in get_args(Interpolation):
        raise UserError(
            f"its images are resized by {interpolation} interpolation: only {get_args(Interpolation)} is supported"
        )
    return Preprocessing(size, channels, mean, std, resize, interpolation, class_order="natural")
