"""What comes as a checkpoint of timm: a file of weights, a training checkpoint, or a folder with its config.

A training checkpoint has more than one network (``state_dict_ema`` holds the averaged weights, which timm prefers, too)
and the names of its wrappers (``module.`` of DDP, ``_orig_mod.`` of torch.compile, ``model.`` of Lightning,
``visual.trunk.`` of open_clip). timm's own also has the command line, and a folder of timm's hub a ``config.json``: the
options of ``timm.create_model``, mean and standard deviation, and the names of the classes.
"""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from illama.checkpoints.load import PATCHES, check_finite
from illama.checkpoints.tensor_files import read_content, read_folder, state_dict
from illama.errors import UserError
from illama.structured_files import parse_json, read_json

_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # in timm's order
HUB_CONFIG = "config.json"
_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
_FROM_SHAPES = ("num_classes", "in_chans", "img_size")  # options that weights decide
# Options that change what is computed. Others of create_model read files, download, or change the type of the network.
_OPTIONS = frozenset(
    name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind.__init__).parameters
) - {"self", "device", "dtype", *_FROM_SHAPES}


@dataclass(frozen=True)
class TimmSource:
    """Weights for a network of timm, and what else is known of it.

    Attributes:
        state: state dict with timm's names.
        weights: path to the file of the weights.
        name: timm's name of the model; empty if only the caller knows it.
        options: options of ``timm.create_model`` that change what is computed.
        preprocessing: values that replace those of the name: ``mean``, ``std``, ``crop_pct``, ``interpolation``.
        image_size: height and width of the images that the network was trained with, if known.
        classes: names of the classes; empty if not known.
        other_files: paths to the config and the shards, if there are any.
    """

    state: dict[str, Tensor]
    weights: Path
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    classes: tuple[str, ...] = ()
    other_files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Stated:
    """What a config or a training command says of the images; None where it says nothing."""

    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    crop_mode: str | None = None
    input_size: tuple[int, int, int] | None = None
    img_size: int | tuple[int, int] | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {name: value for name in _PREPROCESSING if (value := getattr(self, name)) is not None}

    @property
    def size(self) -> tuple[int, int] | None:
        if isinstance(self.img_size, int):
            return self.img_size, self.img_size
        return self.img_size or ((self.input_size[-2], self.input_size[-1]) if self.input_size else None)


@dataclass(frozen=True)
class _HubConfig:
    """The part of timm's config.json that is used."""

    architecture: str
    global_pool: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: _Stated = field(default_factory=_Stated)
    label_names: list[str] | None = None


def read_timm(path: Path) -> TimmSource:
    """Reads a file or a folder of timm, and prints in a line which weights were taken, if there was a choice.

    Raises:
        UserError: the file is missing, damaged, or holds no network or several; or the config cannot be used.
    """
    if path.is_dir():
        return _read_folder(path)
    content, key = read_content(path, _KEYS)
    state = _take_network(state_dict(content[key] if key else content, path), key, path)
    return TimmSource(state, path, **_read_arguments(content.get("args") if key else None, path))


def parse_options(text: str) -> dict[str, Any]:
    """Returns ``name=value,...`` as options of ``timm.create_model``; values are JSON, or text.

    Raises:
        UserError: it has another form, or names an option that does not change what is computed.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, given, value = (each.strip() for each in part.partition("="))
        if not given:
            raise UserError(f"--model-args is NAME=VALUE,..., such as global_pool=avg,fc_norm=false, not {part!r}")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = None if value == "None" else value
    return check_options(found, "--model-args")


def check_options(options: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns ``options``; UserError for one that timm's ViTs do not have, or that the weights decide."""
    if unknown := sorted(options.keys() - _OPTIONS):
        decided = unknown[0] in _FROM_SHAPES
        reason = "the weights decide" if decided else "timm's ViTs do not have"
        raise UserError(f"{where} has an option {unknown[0]!r} that {reason}: leave it out")
    return options


def _stated_options(pool: Any, options: Any, where: str) -> dict[str, Any]:
    """Returns the options that a config or a training command states, without those that the weights decide."""
    if not isinstance(options, Mapping):
        raise UserError(f"{where} has options that are not a mapping: give the state dict and --model-args")
    stated = {**({"global_pool": pool} if pool is not None else {}), **options}
    return check_options({name: value for name, value in stated.items() if name not in _FROM_SHAPES}, where)


def _take_network(given: dict[str, Tensor], key: str, path: Path) -> dict[str, Tensor]:
    """Returns the tensors of the only network in a file, without the prefix of its wrappers."""
    names = list(given)
    prefixes = [name.removesuffix(PATCHES) for name in names if name.endswith(PATCHES)]
    prefix = "" if "" in prefixes or not prefixes else prefixes[0]
    if prefix and len(prefixes) > 1:
        raise UserError(f"{path} holds several networks ({', '.join(prefixes)}): save the state dict of one of them")
    state = {name.removeprefix(prefix): given[name] for name in names if name.startswith(prefix)}
    check_finite(state, path)
    if prefix or key.endswith("ema"):
        rest = len(names) - len(state)
        print(
            f"{path}: took {key or 'the weights'}"
            + (f", names after {prefix!r}" if prefix else "")
            + (f"; left out {rest} other tensors" if rest else ""),
            flush=True,
        )
    return state


def _read_arguments(given: Any, path: Path) -> dict[str, Any]:
    """Returns what the command line of timm's train.py, which is in its checkpoints, says of the network."""
    if not isinstance(given, Namespace) or not hasattr(given, "model_kwargs"):
        return {}
    values, where = vars(given), f"the training command in {path}"
    stated = _Stated(**{each.name: values.get(each.name) or None for each in fields(_Stated)})
    try:
        stated = parse_json(json.dumps(asdict(stated)), _Stated, where)
    except TypeError as error:
        raise UserError(f"{where} holds more than numbers and text: save the state dict alone") from error
    return {
        "options": _stated_options(values.get("gp"), values["model_kwargs"] or {}, where),
        "preprocessing": stated.preprocessing,
        "image_size": stated.size,
    }


def _read_folder(folder: Path) -> TimmSource:
    """Reads a folder of timm's hub: config.json and the weights."""
    config = read_json(folder / HUB_CONFIG, _HubConfig, "ignore")
    files, content, key = read_folder(folder, _KEYS)
    stated = config.pretrained_cfg
    return TimmSource(
        _take_network(content, key, files[0]),
        files[0],
        config.architecture,
        _stated_options(config.global_pool, config.model_args, str(folder / HUB_CONFIG)),
        stated.preprocessing,
        stated.size,
        tuple(config.label_names or ()),
        (folder / HUB_CONFIG, *files[1:]),
    )
