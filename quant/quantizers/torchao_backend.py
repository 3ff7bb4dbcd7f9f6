"""Deployment inside PyTorch with torchao: weights of 8 or 4 bits, dynamically quantized activations, per token.

A scheme with ``backend: torchao`` names tensors like any other scheme. Each Linear gets the torchao config for its two
specs:

    weight                  input                   torchao
    int8 per channel        float                   Int8WeightOnlyConfig
    int8 per channel        uint8 per token          Int8DynamicActivationInt8WeightConfig
    int4 per group          float                   IntxWeightOnlyConfig
    int4 per group          uint8 per token          Int8DynamicActivationIntxWeightConfig
    fp8 per channel         float                   Float8WeightOnlyConfig

There is no calibration: a weight's range is its largest magnitude, and an activation's is computed for each token at
run time. Convolutions and attention stay in floating point. On CPUs 4-bit weights are stored in 8 bits, because
torchao's packed kernels need other hardware. :func:`prepare_qat` and :func:`convert_qat` use torchao's
quantization-aware training.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    quantize_,
)
from torchao.quantization.qat import Float8FakeQuantizeConfig, IntxFakeQuantizeConfig, QATConfig
from torchao.utils import TorchAOBaseTensor

from illama.bundle import TORCHAO
from illama.checkpoints.tensor_files import PLAIN, check_config, read_metadata, read_tensors
from illama.errors import UserError
from illama.models.attention import MaskedNetwork
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA, Linear
from illama.structured_files import parse_json
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import QuantizationPlan, Rotations, Scheme

_METADATA = "illama_torchao"  # one key only: safetensors writes several in no fixed order
_PART = re.compile(r"(.*)\.parts\.0\.")  # of a name in a state dict
_PER_TOKEN = TensorSpec("uint8", "token", symmetric=False)  # the one spec of inputs
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


class SplitLinear(nn.Module):
    """A Linear split into several by its outputs, so that a call for some outputs computes only those.

    A torchao weight would be sliced at every call, which inference mode does not support.

    Args:
        sizes: number of outputs of each part.
    """

    def __init__(self, linear: nn.Linear, sizes: list[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        biases: Any = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
        for weight, bias in zip(linear.weight.split(sizes), biases, strict=True):
            part = Linear(linear.in_features, len(weight), bias is not None, device=weight.device, dtype=weight.dtype)
            part.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                part.bias = nn.Parameter(bias.detach().clone())
            self.parts.append(part)
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        self.bounds = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """(..., in) -> (..., out), or only the outputs in the slice; ValueError if it is not made of whole parts."""
        start, stop, _ = (outputs or slice(None)).indices(self.bounds[-1][1])
        chosen = [index for index, (first, end) in enumerate(self.bounds) if start <= first and end <= stop]
        if not chosen or (self.bounds[chosen[0]][0], self.bounds[chosen[-1]][1]) != (start, stop):
            raise ValueError(f"outputs {start} to {stop} are not whole parts of {self.bounds}")
        results = [self.parts[index](x) for index in chosen]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def quantize_with_torchao(model: MaskedNetwork, plan: QuantizationPlan) -> MaskedNetwork:
    """Returns a copy of ``model`` in evaluation mode with torchao's quantized weights; it cannot be trained.

    Raises:
        UserError: the scheme has another backend, or is not supported by torchao.
    """
    check(model, plan)
    quantized = _split(copy.deepcopy(model)).eval()
    _apply(quantized, plan.scheme, lambda recipe: recipe.deployed)
    return quantized.requires_grad_(False)


def prepare_qat(model: MaskedNetwork, plan: QuantizationPlan) -> MaskedNetwork:
    """Returns a differentiable copy of ``model`` that computes what :func:`convert_qat` will, for training.

    Gradients pass straight through the rounding. Raises UserError like :func:`quantize_with_torchao`.
    """
    check(model, plan)
    prepared = _split(copy.deepcopy(model))
    _apply(prepared, plan.scheme, lambda recipe: QATConfig(None, recipe.activation, recipe.weight, step="prepare"))
    return prepared


def convert_qat(prepared: MaskedNetwork, plan: QuantizationPlan) -> MaskedNetwork:
    """Returns a copy of a trained network of :func:`prepare_qat` in the form of :func:`quantize_with_torchao`.

    Args:
        plan: the plan that it was prepared for.
    """
    converted = copy.deepcopy(prepared).eval()
    _apply(converted, plan.scheme, lambda recipe: QATConfig(recipe.deployed, step="convert"))
    return converted.requires_grad_(False)


def check(model: MaskedNetwork, plan: QuantizationPlan) -> None:
    """Raises UserError if torchao cannot quantize ``model`` by a plan."""
    scheme = plan.scheme
    if scheme.backend != "torchao":
        raise UserError(f"scheme {scheme.name} has backend {scheme.backend}: give one with 'backend: torchao'")
    if scheme.smooth or scheme.gptq or scheme.reconstruction_iterations or scheme.rotate != Rotations():
        raise UserError(
            f"scheme {scheme.name}: torchao has no smooth, rotate, gptq or reconstruction_iterations; leave them out"
        )
    for name in plan.tensors:
        layer = name.removesuffix(".weight").removesuffix(".input")
        if not isinstance(model.get_submodule(layer), nn.Linear):
            raise UserError(f"scheme {scheme.name}: torchao quantizes Linears only; leave {name} in floating point")
        _recipe(scheme, layer)


def write_torchao(model: MaskedNetwork, folder: Path) -> Path:
    """Writes a quantized network into a bundle as TORCHAO, and returns its path.

    The file has tensors and JSON only, no code. The same network gives the same bytes.
    """
    state = model.state_dict()
    packed = {name: value for name, value in state.items() if isinstance(value, TorchAOBaseTensor)}
    tensors, about = flatten_tensor_state_dict(packed)
    tensors |= {name: value for name, value in state.items() if name not in packed}
    facts = json.dumps({"config": model.config.to_dict(), "tensors": about})
    content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, {_METADATA: facts})
    (folder / TORCHAO).write_bytes(content)
    return folder / TORCHAO


def load_torchao(folder: Path, network: MaskedNetwork | None = None) -> MaskedNetwork:
    """Returns the network that :func:`write_torchao` wrote, in evaluation mode, with the same outputs.

    Args:
        network: the same architecture, whose weights are replaced; if None, an iLLaMA is made from the file's config.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    path = folder / TORCHAO
    if not path.exists():
        raise UserError(f"{path} not found: quantize by a scheme with 'backend: torchao' first")
    tensors = read_tensors(path, (*PLAIN, torch.float8_e4m3fn))
    facts = parse_json(read_metadata(path).get(_METADATA, ""), _Facts, f"the metadata of {path}")
    if network is None:
        config = parse_json(json.dumps(facts.config), ModelConfig, f"the config of an iLLaMA in {path}")
        check_config(config, tensors, path)
        network = ILLaMA(config)
    if (expected := network.config.to_dict()) != facts.config:
        raise UserError(f"{path} is of a network {facts.config}, not {expected}")
    try:
        packed, plain = unflatten_tensor_state_dict(tensors, facts.tensors)
        state = packed | plain
        for name in {found[1] for name in state if (found := _PART.match(name))}:
            _split_layer(network, name)
        network.load_state_dict(state, assign=True)
    except Exception as error:  # damaged metadata can raise anything in torchao
        raise UserError(f"{path} is damaged or does not fit its own config: make the bundle again") from error
    return network.requires_grad_(False).eval()


@dataclass(frozen=True)
class _Facts:
    """The JSON in the metadata of a file: the network's config, and torchao's description of its tensors."""

    config: dict[str, Any]
    tensors: dict[str, Any]


@dataclass(frozen=True)
class _Recipe:
    """The torchao configs of a Linear: for deployment, and for fake quantization in training."""

    deployed: AOBaseConfig
    weight: Any
    activation: Any


def _apply(network: nn.Module, scheme: Scheme, config_of: Callable[[_Recipe], AOBaseConfig]) -> None:
    """Applies a config of each recipe to its Linears in ``network``, parts of split ones included."""
    kinds: dict[tuple[TensorSpec | None, TensorSpec | None], set[str]] = {}
    for name, module in network.named_modules():
        layer = _whole(name)
        pair = scheme.spec(f"{layer}.weight"), scheme.spec(f"{layer}.input")
        if isinstance(module, nn.Linear) and any(pair):
            kinds.setdefault(pair, set()).add(name)
    for names in kinds.values():
        recipe = _recipe(scheme, _whole(min(names)))
        quantize_(network, config_of(recipe), lambda _, name, names=names: name in names)


def _whole(name: str) -> str:
    """Returns the layer that a part belongs to; any other name unchanged."""
    return re.sub(r"\.parts\.\d+$", "", name)


def _recipe(scheme: Scheme, layer: str) -> _Recipe:
    """Returns the recipe of one Linear; UserError if torchao has none."""
    weight, activation = scheme.spec(f"{layer}.weight"), scheme.spec(f"{layer}.input")
    place, dynamic = f"scheme {scheme.name}, {layer}", activation is not None
    if weight is None or weight.calibrator != "max" or activation not in (None, _PER_TOKEN):
        raise UserError(
            f"{place}: torchao needs weights with calibrator max, and inputs in float or asymmetric uint8 per token"
        )
    per_token = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if dynamic else None
    kind = (weight.format, weight.granularity)
    # set_inductor_config would change torch.compile and the matmul precision of the whole process.
    if kind == ("int8", "channel"):
        deployed: AOBaseConfig = Int8WeightOnlyConfig(set_inductor_config=False)
        if dynamic:
            deployed = Int8DynamicActivationInt8WeightConfig(MappingType.ASYMMETRIC, set_inductor_config=False)
        return _Recipe(deployed, IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True), per_token)
    if kind == ("int4", "group"):
        groups = PerGroup(weight.group_size)
        deployed = IntxWeightOnlyConfig(_INT4, groups)
        if dynamic:
            deployed = Int8DynamicActivationIntxWeightConfig(_INT4, groups)
        return _Recipe(deployed, IntxFakeQuantizeConfig(_INT4, groups, MappingType.SYMMETRIC), per_token)
    if kind == ("fp8", "channel") and not dynamic:
        deployed = Float8WeightOnlyConfig(set_inductor_config=False)
        return _Recipe(deployed, Float8FakeQuantizeConfig(torch.float8_e4m3fn, PerRow()), None)
    raise UserError(f"{place}: torchao has no {weight} weight for {'8-bit' if dynamic else 'float'} inputs on a CPU")


def _split(model: MaskedNetwork) -> MaskedNetwork:
    """Splits, in place, the one Linear that is called for a slice of its outputs: the last block's qkv."""
    if isinstance(model, ILLaMA) and model.reads_class_token:
        _split_layer(model, f"blocks.{len(model.blocks) - 1}.attn.qkv")
    return model


def _split_layer(model: MaskedNetwork, name: str) -> None:
    """Splits a qkv into q, for the class token, and k with v, for all tokens."""
    qkv = model.get_submodule(name)
    if isinstance(qkv, nn.Linear):
        model.set_submodule(name, SplitLinear(qkv, [qkv.out_features // 3, qkv.out_features // 3 * 2]))
