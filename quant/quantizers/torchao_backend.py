"""Deployment inside PyTorch, by torchao: weights of 8 or 4 bits, activations quantized on the fly, per token.

A scheme with ``backend: torchao`` names its tensors as any other does, and each Linear gets the torchao config that
its two specs amount to:

    weight                  input                   torchao
    int8 per channel        float                   Int8WeightOnlyConfig
    int8 per channel        uint8 per token          Int8DynamicActivationInt8WeightConfig
    int4 per group          float                   IntxWeightOnlyConfig
    int4 per group          uint8 per token          Int8DynamicActivationIntxWeightConfig
    fp8 per channel         float                   Float8WeightOnlyConfig

Nothing is calibrated: a weight's range is its own largest magnitude, and an activation's is each token's, found while
the network runs. Convolutions and attention stay in floating point. CPUs keep 4 bits in 8: torchao's packed kernels are
for other machines. :func:`prepare_qat` and :func:`convert_qat` are torchao's training with the rounding in place.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
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
from illama.errors import UserError
from illama.models.attention import SoftMasked
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA, Linear
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Scheme, resolve

_METADATA = "illama_torchao"  # one key only: safetensors writes several in no fixed order
_PART = re.compile(r"(.*)\.parts\.0\.")  # of a name in a state dict
_PER_TOKEN = TensorSpec("uint8", "token", symmetric=False)  # the one spec of inputs
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


class SplitLinear(nn.Module):
    """A Linear cut into several by its outputs, so that a call which asks for some computes only those.

    torchao's weights are sliced anew at every call, and not at all in inference mode; whole ones need neither.

    Args:
        sizes: outputs of each part.
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
        """(..., in) -> (..., out), or the outputs of the whole parts that the slice names; ValueError for others."""
        start, stop, _ = (outputs or slice(None)).indices(self.bounds[-1][1])
        chosen = [index for index, (first, end) in enumerate(self.bounds) if start <= first and end <= stop]
        if not chosen or (self.bounds[chosen[0]][0], self.bounds[chosen[-1]][1]) != (start, stop):
            raise ValueError(f"outputs {start} to {stop} are not whole parts of {self.bounds}")
        results = [self.parts[index](x) for index in chosen]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def quantize_with_torchao(model: SoftMasked, scheme: Scheme) -> SoftMasked:
    """A copy of ``model`` in evaluation mode whose Linears hold torchao's quantized weights; it cannot be trained.

    Raises:
        UserError: the scheme is of another backend, does not fit the network, or asks for what torchao cannot do.
    """
    check(model, scheme)
    quantized = _split(copy.deepcopy(model)).eval()
    for recipe, layers in _recipes(quantized, scheme):
        _apply(quantized, recipe.deployed, layers)
    return quantized.requires_grad_(False)


def prepare_qat(model: SoftMasked, scheme: Scheme) -> SoftMasked:
    """A copy of ``model`` to be trained: it computes what :func:`convert_qat` will, and is differentiable.

    Gradients pass straight through the rounding. Raises UserError as :func:`quantize_with_torchao`.
    """
    check(model, scheme)
    prepared = _split(copy.deepcopy(model))
    for recipe, layers in _recipes(prepared, scheme):
        config = QATConfig(activation_config=recipe.activation, weight_config=recipe.weight, step="prepare")
        _apply(prepared, config, layers)
    return prepared


def convert_qat(prepared: SoftMasked, scheme: Scheme) -> SoftMasked:
    """What :func:`prepare_qat` made and training changed, as :func:`quantize_with_torchao` leaves a network.

    Args:
        scheme: the one that it was prepared for.
    """
    converted = copy.deepcopy(prepared).eval()
    for recipe, layers in _recipes(converted, scheme):
        _apply(converted, QATConfig(recipe.deployed, step="convert"), layers)
    return converted.requires_grad_(False)


def check(model: SoftMasked, scheme: Scheme) -> None:
    """UserError if torchao cannot quantize ``model`` by ``scheme``, in the words of what to change."""
    if scheme.backend != "torchao":
        raise UserError(f"scheme {scheme.name} is for ONNX: torchao takes one with 'backend: torchao'")
    if scheme.smooth or scheme.reconstruction_iterations:
        raise UserError(f"scheme {scheme.name}: torchao has no smooth and no reconstruction_iterations; leave them out")
    for name in resolve(scheme, model):
        layer = name.removesuffix(".weight").removesuffix(".input")
        if not isinstance(model.get_submodule(layer), nn.Linear):
            raise UserError(f"scheme {scheme.name}: torchao quantizes Linears alone; leave {name} in floating point")
        _recipe(scheme, layer)


def write_torchao(model: SoftMasked, folder: Path) -> Path:
    """Write a quantized network into a bundle as TORCHAO, and return its path: tensors and JSON, nothing that is run.

    The same network gives the same bytes.
    """
    state = model.state_dict()
    packed = {name: value for name, value in state.items() if isinstance(value, TorchAOBaseTensor)}
    tensors, about = flatten_tensor_state_dict(packed)
    tensors |= {name: value for name, value in state.items() if name not in packed}
    facts = json.dumps({"config": model.config.to_dict(), "tensors": about})
    content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, {_METADATA: facts})
    (folder / TORCHAO).write_bytes(content)
    return folder / TORCHAO


def load_torchao(folder: Path, network: SoftMasked | None = None) -> SoftMasked:
    """The network that :func:`write_torchao` wrote, in evaluation mode, giving the same numbers.

    Args:
        network: the same network with any weights, which are replaced; an iLLaMA is made from the file's config.

    Raises:
        UserError: no such file, a damaged one, or one of another network.
    """
    path = folder / TORCHAO
    if not path.exists():
        raise UserError(f"{folder} holds no network quantized by torchao: it has no {TORCHAO}")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()[_METADATA])
        packed, plain = unflatten_tensor_state_dict(safetensors.torch.load_file(path), facts["tensors"])
        network = network or ILLaMA(ModelConfig.from_dict(facts["config"]))
    except UserError as error:
        raise UserError(f"{path} is not an iLLaMA's: give load_torchao the network, {facts['config']}") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or not written by this toolkit: make the bundle again") from error
    state = packed | plain
    if (expected := network.config.to_dict()) != facts["config"]:
        raise UserError(f"{path} is of a network {facts['config']}, not {expected}")
    try:
        for name in {found[1] for name in state if (found := _PART.match(name))}:
            _split_layer(network, name)
        network.load_state_dict(state, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not fit the network that it names: make the bundle again") from error
    return network.requires_grad_(False).eval()


@dataclass(frozen=True)
class _Recipe:
    """What torchao is told of a Linear: how to deploy it, and how to imitate that in training."""

    deployed: AOBaseConfig
    weight: Any
    activation: Any


def _recipes(network: nn.Module, scheme: Scheme) -> list[tuple[_Recipe, set[str]]]:
    """Every kind of quantized Linear with the names of those in ``network``, parts of split ones included."""
    kinds: dict[tuple[TensorSpec | None, TensorSpec | None], set[str]] = {}
    for name, module in network.named_modules():
        layer = _whole(name)
        pair = scheme.spec(f"{layer}.weight"), scheme.spec(f"{layer}.input")
        if isinstance(module, nn.Linear) and any(pair):
            kinds.setdefault(pair, set()).add(name)
    return [(_recipe(scheme, _whole(min(names))), names) for names in kinds.values()]


def _whole(name: str) -> str:
    """The layer that a part of it belongs to; any other name as it is."""
    return re.sub(r"\.parts\.\d+$", "", name)


def _recipe(scheme: Scheme, layer: str) -> _Recipe:
    """What a scheme means for one Linear; UserError if torchao has nothing that does it."""
    weight, activation = scheme.spec(f"{layer}.weight"), scheme.spec(f"{layer}.input")
    place, dynamic = f"scheme {scheme.name}, {layer}", activation is not None
    if weight is None or weight.calibrator != "max" or activation not in (None, _PER_TOKEN):
        raise UserError(
            f"{place}: torchao takes weights by max, and inputs in asymmetric uint8 per token, or in floating point"
        )
    per_token = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if dynamic else None
    kind = (weight.format, weight.granularity)
    # set_inductor_config would change torch.compile, and the precision of products, for the whole process.
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


def _apply(network: nn.Module, config: AOBaseConfig, layers: set[str]) -> None:
    quantize_(network, config, lambda _, name: name in layers)


def _split(model: SoftMasked) -> SoftMasked:
    """Split, in place, the one Linear that is called for a slice of its outputs: the last block's qkv."""
    if isinstance(model, ILLaMA) and model.readout_only:
        _split_layer(model, f"blocks.{len(model.blocks) - 1}.attn.qkv")
    return model


def _split_layer(model: SoftMasked, name: str) -> None:
    """Split a qkv into q, for the class token, and k with v, for all."""
    qkv = model.get_submodule(name)
    if isinstance(qkv, nn.Linear):
        model.set_submodule(name, SplitLinear(qkv, [qkv.out_features // 3, qkv.out_features // 3 * 2]))
