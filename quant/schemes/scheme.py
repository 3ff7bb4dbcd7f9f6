"""Quantization schemes as data: the format of each tensor, and how its range is calibrated.

A scheme maps patterns of tensor names to :class:`TensorSpec`. If several patterns match a name, the last one applies.
The names are the network's own:

    blocks.0.attn.qkv.weight    weight of a Linear or of the patch convolution
    blocks.0.attn.qkv.input     input of that layer
    blocks.0.attn.core.q        operands of attention's two products: q, k, v and p, the masked softmax output
    blocks.0.mlp.fc2.input      the SwiGLU product, or a GELU's output

A tensor that no pattern matches stays in floating point. Residual additions and normalizations have no name, so they
are never quantized. :func:`resolve` applies a scheme to a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from illama.errors import UserError
from illama.manifest import Emulated, LayerFormats, NoTensorRT, Quantization
from illama.models.attention import MaskedNetwork, QuantizerPoint
from illama.structured_files import parse_json, read_yaml, to_yaml
from quant.schemes.formats import FORMATS, FormatName, TensorSpec
from quant.schemes.shipped import shipped_path

FLOAT = "float"  # in a scheme file: these tensors stay in floating point
_PARTS = ("weight", "input")  # of a layer
_OLD_KEYS = {"learned": "reconstruction_iterations"}  # key of older scheme files -> its name now


@dataclass(frozen=True)
class Rotations:
    """What is rotated before quantization, which changes no result of the float network.

    See :mod:`quant.quantizers.rotation`.

    Attributes:
        residual: the residual stream, in the weights; ``auto``: if the network allows it.
        values: v of every attention, in the weights; ``auto``: if the network allows it.
        hidden: channels in a block of the rotation before ``mlp.fc2``, which is computed at run time: a power of 2, or
            a smaller one, at least 16, if it does not divide the hidden size; 0 for none.
        hidden_blocks: how many transformer blocks get that rotation: those where a rounded input of ``mlp.fc2`` changes
            the network's output most; 0 for all. A block whose input of ``mlp.fc2`` stays in floating point gets none.
        seed: of the random rotations.

    Raises:
        UserError: ``hidden``, ``hidden_blocks`` or ``seed`` is invalid.
    """

    residual: bool | Literal["auto"] = False
    values: bool | Literal["auto"] = False
    hidden: int = 0
    hidden_blocks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden and (self.hidden & -self.hidden != self.hidden or not 16 <= self.hidden <= 1024):
            raise UserError(f"rotate.hidden must be 0 or a power of 2 from 16 to 1024, not {self.hidden}")
        if self.hidden_blocks < 0 or (self.hidden_blocks and not self.hidden):
            raise UserError("rotate.hidden_blocks must be 0 or more, and needs rotate.hidden")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"rotate.seed must be from 0 to 2^32 - 1, not {self.seed}")


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme.

    Attributes:
        tensors: pattern (shell-style, matches the whole name) -> spec, or None for floating point.
        smooth: pattern of Linears' names -> SmoothQuant's migration strength, 0..1 (Xiao et al., arXiv 2211.10438,
            equation 4), for those whose input :mod:`quant.quantizers.smoothquant` can rescale; the last match applies.
        rotate: what is rotated, before smoothing.
        gptq: whether weights are rounded by GPTQ (:mod:`quant.quantizers.gptq`) instead of to nearest.
        reconstruction_iterations: iterations of block reconstruction for each block
            (:mod:`quant.quantizers.reconstruction`); 0 for none.
        backend: ``onnx`` exports a graph with Q/DQ for ONNX Runtime and TensorRT; ``torchao`` runs inside PyTorch with
            dynamically quantized activations (:mod:`quant.quantizers.torchao_backend`).
        summary: one line for python quant/list_schemes.py.

    Raises:
        UserError: a value is invalid.
    """

    name: str
    tensors: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    smooth: Mapping[str, float] = field(default_factory=dict)
    rotate: Rotations = field(default_factory=Rotations)
    gptq: bool = False
    reconstruction_iterations: int = 0
    backend: Literal["onnx", "torchao"] = "onnx"
    summary: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise UserError(
                f"a scheme's name may have lower-case letters, digits, '.', '_' and '-' only: change {self.name!r}"
            )
        if not all(0 <= strength <= 1 for strength in self.smooth.values()):
            raise UserError(f"scheme {self.name}: smooth must map patterns of Linears to strengths from 0 to 1")
        if not 0 <= self.reconstruction_iterations <= 1_000_000:
            raise UserError(f"scheme {self.name}: reconstruction_iterations must be an integer from 0 to 1,000,000")

    def rounding_to_nearest(self) -> Scheme:
        """Returns the scheme without GPTQ and block reconstruction, which adapt weights to each other's errors."""
        return replace(self, gptq=False, reconstruction_iterations=0)

    def spec(self, tensor: str) -> TensorSpec | None:
        """Returns the spec of a tensor; None if it stays in floating point."""
        return _last_match(self.tensors, tensor)

    def strength(self, linear: str) -> float | None:
        """Returns SmoothQuant's strength for the input of a Linear; None for no smoothing."""
        return _last_match(self.smooth, linear)


def _last_match(patterns: Mapping[str, Any], name: str) -> Any:
    return next((value for pattern, value in reversed([*patterns.items()]) if fnmatchcase(name, pattern)), None)


def tensor_names(model: nn.Module) -> list[str]:
    """Returns the name of every tensor of a network that can be quantized, in the order of its modules."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            names += [f"{name}.weight", f"{name}.input"]
        elif isinstance(module, QuantizerPoint):
            names.append(name)
    return names


@dataclass(frozen=True)
class QuantizationPlan:
    """A scheme resolved for a network: what is quantized, and how.

    Attributes:
        tensors: every tensor that is quantized -> its spec, in the network's order.
        layers: formats of all layers, for people; equally quantized blocks share an entry.
    """

    scheme: Scheme
    tensors: Mapping[str, TensorSpec]
    layers: tuple[LayerFormats, ...]

    @property
    def onnx_formats(self) -> set[str]:
        """ONNX's names of the number formats; unsigned ones are named as signed, since files may have either."""
        return {spec.dtype.onnx_name.removeprefix("U") for spec in self.tensors.values()}

    @property
    def quantization(self) -> Quantization:
        """The plan as a bundle's manifest holds it."""
        if self.scheme.backend == "torchao":
            return Quantization(self.scheme.name, self.layers, "pytorch")
        reasons = unfit_for_tensorrt(self.tensors), emulated_on_cpus(self.tensors)
        return Quantization(self.scheme.name, self.layers, *reasons)


def resolve(scheme: Scheme, model: nn.Module) -> QuantizationPlan:
    """Returns the plan to quantize ``model`` by ``scheme``.

    Raises:
        UserError: a pattern matches nothing, or a spec does not fit its tensor.
    """
    names = tensor_names(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in scheme.smooth:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise UserError(
                f"scheme {scheme.name}: no Linear to smooth matches {pattern!r}; names are such as {linears[0]}"
            )
    no_head = ["head.weight", "head.input"] if isinstance(model, MaskedNetwork) and model.config.features else []
    for pattern in scheme.tensors:
        if not any(fnmatchcase(name, pattern) for name in [*names, *no_head]):
            raise UserError(
                f"scheme {scheme.name}: no tensor matches {pattern!r}; names are such as {names[len(names) // 2]}"
            )
    tensors = {name: spec for name in names if (spec := scheme.spec(name)) is not None}
    for name, spec in tensors.items():
        _check(scheme, name, spec, model)
    return QuantizationPlan(scheme, tensors, _describe(tensors, model))


def _check(scheme: Scheme, name: str, spec: TensorSpec, model: nn.Module) -> None:
    trouble = ""
    if not name.endswith(".weight"):
        fits = "token" if scheme.backend == "torchao" else "block" if spec.dtype.block else "tensor"
        if spec.granularity != fits:
            trouble = f"an activation has one scale per {fits} in {scheme.backend}"
        elif spec.dtype.block and spec.calibrator != "max":
            trouble = "an activation's blocks have their range at run time: leave out the calibrator"
    else:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if spec.granularity == "token":
            trouble = "only an activation has one scale per token"
        elif not spec.dtype.signed or spec.calibrator not in ("max", "mse") or spec.amax is not None:
            trouble = "a weight needs a signed format, calibrator max or mse, and no amax"
        elif spec.granularity == "group" and isinstance(layer, nn.Conv2d):
            trouble = "a convolution's weight has one scale per channel: groups are for Linears"
        elif spec.granularity == "group" and layer.in_features % spec.group_size:  # type: ignore[operator]
            trouble = (
                f"groups of {spec.group_size} do not divide its {layer.in_features} inputs: choose another group_size"
            )
    if trouble := trouble or (_block_trouble(name, spec, model) if spec.dtype.block else ""):
        raise UserError(f"scheme {scheme.name}, {name}: {trouble}")


def _block_trouble(name: str, spec: TensorSpec, model: nn.Module) -> str:
    """Returns why a tensor cannot have a format with block scales; empty if it can."""
    layer = model.get_submodule(name.removesuffix(".weight").removesuffix(".input"))
    if not isinstance(layer, nn.Linear):
        return f"{spec.format} is for weights and inputs of Linears: leave it in floating point, or choose fp8"
    if layer.in_features % spec.dtype.block:
        return f"blocks of {spec.dtype.block} do not divide its {layer.in_features} inputs: choose another format"
    return ""


def unfit_for_tensorrt(tensors: Mapping[str, TensorSpec]) -> NoTensorRT | None:
    """Returns why TensorRT has no kernels for the tensors of a plan; None if it has."""
    for name, spec in tensors.items():
        bits = spec.dtype.bits
        layer = name.removesuffix(".weight").removesuffix(".input")
        weight, activation = (found.format if (found := tensors.get(f"{layer}.{part}")) else FLOAT for part in _PARTS)
        if spec.dtype.block:
            if weight != activation and (weight, activation) != ("nvfp4", FLOAT):
                return "blocks"
        elif not name.endswith(".weight"):
            if bits < 8 or not (spec.symmetric or name.endswith(".input")):
                return "activations"
        elif bits == 6 or (bits == 4 and activation != FLOAT):
            return "weights"
    return None


def emulated_on_cpus(tensors: Mapping[str, TensorSpec]) -> Emulated | None:
    """Returns why the latency on a CPU is meaningless for the tensors of a plan; None if it is not."""
    formats = {spec.format for spec in tensors.values()}
    if any(FORMATS[name].block for name in formats):
        return "blocks"
    if "fp8" in formats:
        return "fp8"
    if any(FORMATS[name].bits == 6 for name in formats):
        return "6-bit"
    if any(spec.dtype.bits == 4 and not name.endswith(".weight") for name, spec in tensors.items()):
        return "4-bit activations"
    return None


def _describe(plan: Mapping[str, TensorSpec], model: nn.Module) -> tuple[LayerFormats, ...]:
    rows: dict[tuple[str, str, str], list[int]] = {}
    for layer in dict.fromkeys(name.removesuffix(".weight").removesuffix(".input") for name in tensor_names(model)):
        weight, activation = (str(plan.get(key, FLOAT)) for key in (f"{layer}.weight", f"{layer}.input"))
        if layer in plan or isinstance(model.get_submodule(layer), QuantizerPoint):
            weight, activation = "", str(plan.get(layer, FLOAT))
        block = re.search(r"\bblocks\.(\d+)\.", layer)
        general = re.sub(r"\bblocks\.\d+\.", "blocks.*.", layer)
        rows.setdefault((general, weight, activation), []).extend([int(block[1])] if block else [])
    return tuple(
        LayerFormats(layer.replace("*", _ranges(blocks)), weight, activation)
        for (layer, weight, activation), blocks in rows.items()
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda each: each[1] - each[0])]
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


@cache
def shipped_scheme(name: str) -> Scheme:
    """Returns the shipped scheme of that name; UserError if there is none."""
    return read_scheme(shipped_path(name))


def read_scheme(path: Path) -> Scheme:
    """Reads a scheme from YAML.

    The keys are the fields of :class:`Scheme`. ``base`` names a shipped scheme whose values are the defaults, and whose
    ``tensors`` come before the file's own. A spec is a mapping of :class:`TensorSpec`'s fields, or only its format, or
    ``float``. The name defaults to the file's.

    Raises:
        UserError: the file is missing or damaged, a key is unknown, or a value is invalid.
    """
    given = read_yaml(path, dict[str, Any])
    try:
        given = {"name": path.stem.lower(), **rename_old_keys(given)}
        base = shipped_scheme(str(given.pop("base"))) if "base" in given else Scheme(path.stem.lower())
        own = parse_json(json.dumps(given.pop("tensors", {})), dict[str, TensorSpec | str], "tensors")
        # The file's patterns come after all patterns of the base, so that they apply.
        kept = {pattern: spec for pattern, spec in base.tensors.items() if pattern not in own}
        values = {**asdict(replace(base, tensors={})), **given}
        tensors = {**kept, **{pattern: _read_spec(value) for pattern, value in own.items()}}
        return replace(parse_json(json.dumps(values), Scheme, "the scheme"), tensors=tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def stored_scheme(values: Mapping[str, Any], name: str) -> Scheme:
    """Returns the scheme in the JSON of a file of weights; UserError that begins with ``name`` if it is damaged."""
    return parse_json(json.dumps(rename_old_keys(values)), Scheme, name)


def rename_old_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a scheme's values with the keys of older files renamed; UserError if both names of a key are given."""
    for old, new in _OLD_KEYS.items():
        if old in values and new in values:
            raise UserError(f"{old} is the former name of {new}: give {new} only")
    return {_OLD_KEYS.get(key, key): value for key, value in values.items()}


def _read_spec(value: TensorSpec | str) -> TensorSpec | None:
    if isinstance(value, TensorSpec):
        return value
    return None if value == FLOAT else TensorSpec(cast(FormatName, value))


def write_scheme(scheme: Scheme, path: Path) -> None:
    """Writes a scheme as YAML, from which :func:`read_scheme` reads an equal one."""
    defaults = asdict(TensorSpec("int8"))
    tensors: dict[str, Any] = {}
    for pattern, spec in scheme.tensors.items():
        values = {} if spec is None else {k: v for k, v in asdict(spec).items() if k == "format" or v != defaults[k]}
        tensors[pattern] = values or FLOAT
    path.write_text(to_yaml({**asdict(scheme), "tensors": tensors}))
