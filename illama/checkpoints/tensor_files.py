"""The gate for files of tensors from outside: dense tensors by name, or one error in one line.

Nothing in a file is executed, and nothing is filled that the file does not hold: a tensor that repeats its storage
(stride 0), a zip entry that grows when it is read, and a network that is larger than the file are refused.
"""

from __future__ import annotations

import argparse
import lzma
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from illama.errors import UserError
from illama.models.config import ModelConfig
from illama.structured_files import check_regular, read_json

PLAIN = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FOLDER_FILES = (INDEX, SINGLE, "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_LARGEST_RATIO = 4  # of weights to their .xz
_SHARED = 2  # tied weights make the tensors larger than the file, but hardly twice


@dataclass(frozen=True)
class _Index:
    """The key of the shards' index that is used."""

    weight_map: dict[str, str]


def read_tensors(path: Path, dtypes: Sequence[torch.dtype] = PLAIN) -> dict[str, Tensor]:
    """Reads a .safetensors file, or the state dict in a file of ``torch.save``, as it is or under a key.

    The key is ``model`` (the released code's and DeiT's) or ``state_dict`` (timm's).

    Args:
        dtypes: dtypes that the caller can use.

    Raises:
        UserError: the file is missing, damaged, or has other values than dense tensors of ``dtypes``.
    """
    content, key = read_content(path, ("model", "state_dict"))
    return state_dict(content[key] if key else content, path, dtypes)


def read_content(path: Path, keys: Sequence[str]) -> tuple[dict[Any, Any], str]:
    """Returns what a .safetensors file or a file of ``torch.save`` holds, and which of ``keys`` its state dict has.

    The key is the first that the file has; it is empty if there is none, as for a state dict itself.

    Raises:
        UserError: see :func:`read_pickle`; also if the file is the state of an unfinished training run of this project.
    """
    if path.suffix == ".safetensors":
        with _damaged(path):
            return safetensors.torch.load_file(path), ""
    if path.name.endswith(".safetensors.xz"):
        with _damaged(path), lzma.open(path) as file:
            return safetensors.torch.load(file.read(_LARGEST_RATIO * path.stat().st_size)), ""
    content = read_pickle(path)
    if {"model", "average", "step"} <= content.keys():
        raise UserError(f"{path} is the state of a training run, without its config: use the run's bundle")
    return content, next((key for key in keys if content.get(key) is not None), "")


def read_pickle(path: Path) -> dict[Any, Any]:
    """Reads the dict in a file of ``torch.save``, without running code from it.

    Raises:
        UserError: the file is missing, damaged, or has other objects than a dict of plain values and tensors.
    """
    with _damaged(path):
        mapped = zipfile.is_zipfile(path)
        if mapped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type or entry.file_size != entry.compress_size for entry in archive.infolist()):
                    raise ValueError("torch.save does not compress")
        # The released code also saves its command line, as a Namespace, which contains only data. A mapped file bounds
        # every storage by the file; otherwise PyTorch trusts the sizes in the pickle.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a state dict of tensors")
    return content


def check_tensors(state: Mapping[Any, Any], path: Path, dtypes: Sequence[torch.dtype] = PLAIN) -> None:
    """Raises UserError unless all values are dense tensors of ``dtypes`` that are no larger than the file."""
    claimed = 0
    for name, value in state.items():
        if not isinstance(name, str) or type(value) not in (Tensor, torch.nn.Parameter):
            raise UserError(f"{path} is not a state dict of tensors")
        if value.is_nested or value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in dtypes:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise UserError(f"{path}: {name} is a tensor of {kind} on {value.device}, which cannot be used")
        claimed += math.prod(max(1, size) for size in value.shape) * value.element_size()
    if claimed > _SHARED * path.stat().st_size:
        raise UserError(f"{path} claims tensors of {claimed} bytes in all, more than the file has")


def read_folder(folder: Path, keys: Sequence[str]) -> tuple[list[Path], dict[str, Tensor], str]:
    """Reads the weights in a folder of timm's hub or of Hugging Face.

    Returns:
        The files, the index of shards first if there is one; their state dict; and its key, as :func:`read_content`.

    Raises:
        UserError: there are none, or a file is damaged or holds more than tensors.
    """
    weights = next((folder / each for each in FOLDER_FILES if (folder / each).exists()), None)
    if weights is None:
        raise UserError(f"{folder} has no weights: one of {', '.join(FOLDER_FILES)} is needed")
    shards = sorted({folder / file for file in shard_files(folder).values()}) if weights.name == INDEX else [weights]
    state: dict[str, Tensor] = {}
    for path in shards:
        content, key = read_content(path, keys)
        state |= state_dict(content[key] if key else content, path)
    return ([weights, *shards] if weights.name == INDEX else [weights]), state, key


def state_dict(given: Any, path: Path, dtypes: Sequence[torch.dtype] = PLAIN) -> dict[str, Tensor]:
    """Returns the content of a file if it is a state dict; raises UserError if not, as :func:`check_tensors`."""
    if not isinstance(given, Mapping):
        raise UserError(f"{path} is not a state dict of tensors")
    check_tensors(given, path, dtypes)
    return dict(given)


def shard_files(folder: Path) -> dict[str, str]:
    """Returns tensor name -> file name of a folder in Hugging Face's format; UserError if it has no .safetensors."""
    if (folder / INDEX).exists():
        return read_json(folder / INDEX, _Index, "ignore").weight_map
    if not (folder / SINGLE).exists():
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: give a folder in Hugging Face's format")
    with _damaged(folder / SINGLE), safe_open(folder / SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a .safetensors file; raises UserError if it is missing or damaged."""
    with _damaged(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_tensor(path: Path, name: str) -> Tensor:
    """Returns one tensor of a .safetensors file, opened for it alone.

    While a file is open, its mapped pages count as memory of this process.

    Raises:
        UserError: the file is missing or damaged, or has no such tensor that can be used.
    """
    with _damaged(path), safe_open(path, "pt") as file:
        if name not in file.keys():  # noqa: SIM118 - it is not a dict
            raise UserError(f"{path} has no tensor {name}: download it again")
        value = file.get_tensor(name)
    check_tensors({name: value}, path)
    return value


def check_config(config: ModelConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError if a network of this config would be larger than the tensors of its file.

    To be called before the network is built, which takes time and memory in proportion to its config.
    """
    values = sum(value.numel() for value in state.values())
    if config.depth > len(state) or config.least_parameters > _SHARED * values:
        raise UserError(
            f"{path} does not fit its config: depth {config.depth} and width {config.width} need more than its "
            f"{len(state)} tensors of {values} values in all"
        )


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Refuses what is not a regular file, and turns what the readers raise for a damaged one into UserError."""
    check_regular(path)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path} contains more than tensors and was not loaded: save only its state dict"
            ) from error
        raise UserError(f"{path} is damaged, truncated or not a checkpoint: replace it") from error
