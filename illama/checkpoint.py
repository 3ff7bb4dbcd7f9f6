"""Trained weights from a bundle, a .safetensors file or a released .pth file, checked before use."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from illama.bundle import WEIGHTS, Manifest
from illama.config import ModelConfig
from illama.data import Preprocessing
from illama.errors import UserError
from illama.model import ILLaMA

SHIPPED = Path(__file__).parent / "weights" / "nano-fashion-mnist"


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what it needs to be used.

    Attributes:
        model: in evaluation mode, on the CPU, float32.
        preprocessing: the transform it was trained with; None where the file does not say.
        classes: names in the order of the logits; empty where the file does not say.
        weights: the file that the weights came from.
    """

    model: ILLaMA
    preprocessing: Preprocessing | None
    classes: tuple[str, ...]
    weights: Path


def load_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Load a bundle folder, a .safetensors file, or a .pth of the released code (key ``model``).

    A bundle names its config. For a bare file the config is read off the shapes, with 64-wide heads and
    the released code's mask and positions; pass ``config`` where that is wrong.

    Raises:
        UserError: missing, truncated, not finite, of another config, or a pickle that holds more than tensors.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    weights = path / WEIGHTS if path.is_dir() else path
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()
    if path.is_dir() or (weights.name == WEIGHTS and (folder / "manifest.json").exists()):
        manifest = Manifest.read(folder)
        stored = ModelConfig.from_dict(manifest.config)
        if config is not None and config != stored:
            raise UserError(f"{path} was trained with another config: {_differences(stored, config)}")
        config = stored
        preprocessing, classes = _read_preprocessing(manifest), tuple(manifest.classes)
    state = read_state(weights)
    model = ILLaMA(config or config_from_shapes(state, weights))
    _load_state(model, state, weights)
    return Checkpoint(model.eval(), preprocessing, classes, weights)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without running any code that the file may hold; UserError if unusable."""
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            # The released code saves its command line beside the weights; a Namespace holds data only.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
            state = content.get("model", content)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, and it was not run: save its state dict alone") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path} is unreadable, truncated or not a checkpoint: fetch it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict of tensors")
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path} has NaN or infinite values in {name}: train it again or take an earlier one")
    return dict(state)


def config_from_shapes(state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """The config that a released state dict implies: class token last, mask after the softmax, RoPE."""
    try:
        width, in_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        return ModelConfig(
            image_size=side * patch_size,
            patch_size=patch_size,
            in_channels=in_channels,
            width=width,
            depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            heads=max(1, width // 64),
            num_classes=len(state["head.weight"]),
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not an iLLaMA checkpoint: its parameter names or shapes are others'") from error


def _load_state(model: ILLaMA, state: Mapping[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    for name in expected.keys() | state.keys():
        if name not in state or name not in expected:
            raise UserError(f"{path} does not fit the config: {name} is {'missing' if name in expected else 'unknown'}")
        if expected[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
            raise UserError(f"{path} does not fit the config: {name} has shape {shapes}")
    model.load_state_dict(state)


def _read_preprocessing(manifest: Manifest) -> Preprocessing:
    values = manifest.preprocessing
    return Preprocessing(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _differences(stored: ModelConfig, asked: ModelConfig) -> str:
    one, other = stored.to_dict(), asked.to_dict()
    return ", ".join(f"{name} {one[name]}, not {other[name]}" for name in one if one[name] != other[name])
