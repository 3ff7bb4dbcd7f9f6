"""Quantization schemes as data: which tensors are quantized, to which number format, and how their ranges are found.

A scheme maps patterns of tensor names to :class:`TensorSpec`, and the last pattern that matches a name decides. The
names are the network's own:

    blocks.0.attn.qkv.weight    weight of a Linear or of the patch convolution
    blocks.0.attn.qkv.input     what that layer multiplies it with
    blocks.0.attn.core.q        operands of attention's two products: q, k, v and p, the masked softmax output
    blocks.0.mlp.fc2.input      among them, the SwiGLU product

Whatever no pattern matches stays in floating point; residual additions and normalisations have no name, so they
always do. :func:`resolve` is the one place where a scheme meets a network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from illama.errors import UserError
from illama.models.attention import QuantizerPoint
from quant.schemes.formats import FORMATS, TensorSpec

FLOAT = "float"  # in a scheme file: leave these tensors alone


@dataclass(frozen=True)
class Scheme:
    """What is quantized to what.

    Attributes:
        tensors: pattern (shell-style, over the whole name) -> spec, or None to leave those tensors in floating point.
        smooth: pattern of Linears' names -> SmoothQuant's migration strength, 0..1 (Xiao et al., arXiv 2211.10438,
            equation 4), for those whose input :mod:`quant.quantizers.smoothquant` can rescale; the last that matches
            decides.
        learned: steps a block in which rounding and scales are learned (:mod:`quant.quantizers.reconstruction`); 0 for
            none.
        backend: ``onnx``: a graph with Q/DQ for ONNX Runtime and TensorRT; ``torchao``: runs inside PyTorch, where
            activations are quantized on the fly (:mod:`quant.quantizers.torchao_backend`).
        summary: what it is for, in a sentence.
    """

    name: str
    tensors: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    smooth: Mapping[str, float] = field(default_factory=dict)
    learned: int = 0
    backend: Literal["onnx", "torchao"] = "onnx"
    summary: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise UserError(f"a scheme's name is lower-case letters, digits, '.', '_' and '-', not {self.name!r}")
        if not isinstance(self.smooth, Mapping) or not all(0 <= strength <= 1 for strength in self.smooth.values()):
            raise UserError(f"scheme {self.name}: smooth must map patterns of Linears to strengths within 0 and 1")
        if not isinstance(self.learned, int) or self.learned < 0 or self.backend not in ("onnx", "torchao"):
            raise UserError(f"scheme {self.name}: learned must be a whole number from 0, and backend onnx or torchao")

    def spec(self, tensor: str) -> TensorSpec | None:
        """The spec of a tensor; None for one that stays in floating point."""
        return _last_match(self.tensors, tensor)

    def strength(self, linear: str) -> float | None:
        """How strongly the input of a Linear is smoothed; None for not at all."""
        return _last_match(self.smooth, linear)


def _last_match(patterns: Mapping[str, Any], name: str) -> Any:
    found = None
    for pattern, value in patterns.items():
        if fnmatchcase(name, pattern):
            found = value
    return found


def tensor_names(model: nn.Module) -> list[str]:
    """The name of every tensor of a network that can be quantized, in the order of its modules."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            names += [f"{name}.weight", f"{name}.input"]
        elif isinstance(module, QuantizerPoint):
            names.append(name)
    return names


def resolve(scheme: Scheme, model: nn.Module) -> dict[str, TensorSpec]:
    """Every tensor that ``scheme`` quantizes in ``model`` -> its spec, in the network's order.

    Raises:
        UserError: for a pattern that matches nothing, or a spec that does not fit its tensor.
    """
    names = tensor_names(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in scheme.smooth:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise UserError(
                f"scheme {scheme.name}: no Linear to smooth matches {pattern!r}; a name is, say, {linears[0]}"
            )
    for pattern in scheme.tensors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"scheme {scheme.name}: no tensor matches {pattern!r}; a name is, say, {names[len(names) // 2]}"
            )
    plan = {name: spec for name in names if (spec := scheme.spec(name)) is not None}
    for name, spec in plan.items():
        _check(scheme, name, spec, model)
    return plan


def _check(scheme: Scheme, name: str, spec: TensorSpec, model: nn.Module) -> None:
    trouble = ""
    if not name.endswith(".weight"):
        fits = "token" if scheme.backend == "torchao" else "tensor"
        trouble = "" if spec.granularity == fits else f"an activation has one scale per {fits} in {scheme.backend}"
    else:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if spec.granularity == "token":
            trouble = "a weight has no tokens"
        elif not spec.dtype.signed or spec.calibrator not in ("max", "mse") or spec.amax is not None:
            trouble = "a weight takes a signed format, and its range by max or mse"
        elif spec.granularity == "group" and isinstance(layer, nn.Conv2d):
            trouble = "a convolution's weight has one scale per channel"
        elif spec.granularity == "group" and layer.in_features % spec.group_size:  # type: ignore[operator]
            trouble = (
                f"groups of {spec.group_size} do not divide its {layer.in_features} inputs: choose another group_size"
            )
    if trouble:
        raise UserError(f"scheme {scheme.name}, {name}: {trouble}")


def unfit_for_tensorrt(plan: Mapping[str, TensorSpec]) -> str:
    """Why TensorRT has no kernels for a resolved scheme, in a sentence; empty if it has."""
    for name, spec in plan.items():
        bits = spec.dtype.bits
        if not name.endswith(".weight"):
            if bits < 8 or not (spec.symmetric or name.endswith(".input")):
                return "TensorRT quantizes activations to 8 bits, symmetric; only a layer's input can be shifted there"
        elif bits == 6 or (bits == 4 and f"{name.removesuffix('.weight')}.input" in plan):
            return (
                "TensorRT multiplies weights of fewer than 8 bits by half-precision inputs alone, and of 4 bits at that"
            )
    return ""


def emulated_on_cpus(plan: Mapping[str, TensorSpec]) -> str:
    """Why the speed of a resolved scheme on a CPU says nothing, in a sentence; empty if it does."""
    formats = {spec.format for spec in plan.values()}
    if "fp8" in formats:
        return "no CPU multiplies FP8, and ONNX Runtime only emulates it"
    if any(FORMATS[name].bits == 6 for name in formats):
        return "6 bits are simulated"
    if any(spec.dtype.bits == 4 and not name.endswith(".weight") for name, spec in plan.items()):
        return "no CPU multiplies 4-bit activations, and ONNX Runtime only emulates it"
    return ""


def describe(plan: Mapping[str, TensorSpec], model: nn.Module) -> list[tuple[str, str, str]]:
    """What a resolved scheme does: rows of (layer, weight, input), one layer of all equal blocks to a row."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for layer in dict.fromkeys(name.removesuffix(".weight").removesuffix(".input") for name in tensor_names(model)):
        weight, activation = (str(plan.get(key, FLOAT)) for key in (f"{layer}.weight", f"{layer}.input"))
        if layer in plan or isinstance(model.get_submodule(layer), QuantizerPoint):
            weight, activation = "", str(plan.get(layer, FLOAT))
        block = re.search(r"\bblocks\.(\d+)\.", layer)
        general = re.sub(r"\bblocks\.\d+\.", "blocks.*.", layer)
        rows.setdefault((general, weight, activation), []).extend([int(block[1])] if block else [])
    return [
        (layer.replace("*", _ranges(blocks)), weight, activation)
        for (layer, weight, activation), blocks in rows.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


_INT8 = TensorSpec("int8")
# Asymmetric: of a GELU's output one half of a symmetric range would be empty, and no other input is worse for it. The
# graph for TensorRT, which knows no zero point, gets the same integers by a shift (quant.quantizers.layers).
_INPUT8 = TensorSpec("uint8", symmetric=False)
_WEIGHT8 = TensorSpec("int8", "channel")
_WEIGHT4 = TensorSpec("int4", "group", calibrator="mse")
# The network reads pixels in floating point: an image has 256 values to a colour, whose grid is not the quantizer's,
# and the convolution is too small for its speed to matter. Its weights are rounded.
_PIXELS = {"*patch_embed.*.input": None}
# The SwiGLU product has the widest range of all, which smoothing narrows (docs/quantization.md).
_SMOOTH_PRODUCT = {"*.mlp.fc2": 0.7}
# Attention's own products stay in floating point. A softmax over N tokens gives values around 1 / N, which for the 200
# to 600 tokens of a real image is a step or two of 8 bits, and rounding them costs more than all the rest (the same
# page); and of q and k, no runtime here is faster for having them rounded (docs/cpu.md).
_INT8_TENSORS = {"*.weight": _WEIGHT8, "*.input": _INPUT8, **_PIXELS}
_FP8_TENSORS = {"*.weight": TensorSpec("fp8", "channel"), "*.input": TensorSpec("fp8"), **_PIXELS}
# The first and the last layer are few weights, and much to lose.
_ENDS8 = {"*patch_embed.*.weight": _WEIGHT8, **_PIXELS, "*head.weight": _WEIGHT8, "*head.input": _INPUT8}
_BLOCKS4 = {"*.weight": _WEIGHT4, "*patch_embed.*.weight": _WEIGHT8, "*head.weight": _WEIGHT8}
# torchao quantizes Linears alone, and inputs per token while the network runs (quant/quantizers/torchao_backend.py).
_NO_PATCHES = {"*patch_embed.*.weight": None}
_LINEARS8 = {"*.weight": _WEIGHT8, **_NO_PATCHES}
PER_TOKEN = TensorSpec("uint8", "token", symmetric=False)
_WEIGHT4_MAX = TensorSpec("int4", "group", 32)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", _INT8_TENSORS, _SMOOTH_PRODUCT, summary="W8A8 Linears, attention in floating point"),
        Scheme(
            "int8-attention",
            {**_INT8_TENSORS, "*.core.[qkv]": _INT8, "*.core.p": TensorSpec("uint8", calibrator="mse")},
            _SMOOTH_PRODUCT,
            summary="W8A8, both attention products included: for short sequences",
        ),
        Scheme(
            "int8-smooth",
            _INT8_TENSORS,
            {"*": 0.5, **_SMOOTH_PRODUCT},
            summary="W8A8 after SmoothQuant of every Linear, for activation outliers",
        ),
        Scheme("int8-weight-only", {"*.weight": _WEIGHT8}, summary="8-bit weights: a quarter of the size"),
        Scheme("fp8", _FP8_TENSORS, summary="E4M3 Linears, attention in half precision"),
        Scheme(
            "fp8-attention",
            # The softmax output is 1 at most: TensorRT's fused FP8 attention fixes its scale at 1/448.
            {**_FP8_TENSORS, "*.core.[qkv]": TensorSpec("fp8"), "*.core.p": TensorSpec("fp8", amax=1.0)},
            summary="E4M3 Linears and both attention products",
        ),
        Scheme(
            "mixed",
            {**_INT8_TENSORS, "*.mlp.fc2.input": None},
            summary="W8A8, but the SwiGLU product, the hardest tensor, stays in half precision",
        ),
        Scheme(
            "w4a8",
            {**_INT8_TENSORS, **_BLOCKS4},
            _SMOOTH_PRODUCT,
            learned=200,
            summary="4-bit weights in groups of 64, 8-bit activations",
        ),
        Scheme("w4a16", _BLOCKS4, learned=200, summary="4-bit weights in groups of 64, activations in half precision"),
        Scheme(
            "w6a6",
            {
                "*.weight": TensorSpec("int6", "channel", calibrator="mse"),
                "*.input": TensorSpec("int6", calibrator="mse"),
                "*.core.[qkv]": TensorSpec("int6", calibrator="mse"),
                "*.core.p": TensorSpec("uint6"),
                **_ENDS8,
            },
            _SMOOTH_PRODUCT,
            learned=200,
            summary="6 bits, simulated: no hardware multiplies them, and files keep 8",
        ),
        Scheme(
            "w4a4",
            {
                "*.weight": TensorSpec("int4", "channel", calibrator="mse"),
                "*.input": TensorSpec("int4", calibrator="mse"),
                "*.core.[qkv]": TensorSpec("int4", calibrator="mse"),
                "*.core.p": TensorSpec("uint4", calibrator="mse"),
                **_ENDS8,
            },
            _SMOOTH_PRODUCT,
            learned=200,
            summary="4 bits throughout the blocks: for quantization-aware training",
        ),
        Scheme(
            "int8-dynamic",
            {**_LINEARS8, "*.input": PER_TOKEN, **_PIXELS},
            backend="torchao",
            summary="inside PyTorch: W8A8 Linears, inputs quantized on the fly per token, no calibration",
        ),
        Scheme(
            "int8-weight-only-torchao", _LINEARS8, backend="torchao", summary="inside PyTorch: 8-bit weights of Linears"
        ),
        Scheme(
            "fp8-weight-only-torchao",
            {"*.weight": TensorSpec("fp8", "channel"), **_NO_PATCHES},
            backend="torchao",
            summary="inside PyTorch: E4M3 weights of Linears",
        ),
        Scheme(
            "w4a8-dynamic",
            {"*.weight": _WEIGHT4_MAX, "*.input": PER_TOKEN, **_PIXELS, **_NO_PATCHES, "*head.weight": _WEIGHT8},
            backend="torchao",
            summary="inside PyTorch: 4-bit weights in groups of 32, inputs of 8 bits per token; CPUs keep 8",
        ),
        Scheme(
            "w4a16-torchao",
            {"*.weight": _WEIGHT4_MAX, **_NO_PATCHES, "*head.weight": _WEIGHT8},
            backend="torchao",
            summary="inside PyTorch: 4-bit weights in groups of 32; CPUs keep 8",
        ),
    )
}


def find_scheme(name: str) -> Scheme:
    """The shipped scheme of that name; UserError if there is none."""
    if name not in SCHEMES:
        raise UserError(f"unknown scheme {name!r}: choose from {', '.join(SCHEMES)}")
    return SCHEMES[name]


def read_scheme(path: Path) -> Scheme:
    """A scheme of the user's own, from YAML.

    The keys are those of :class:`Scheme`; ``base`` names a shipped scheme to start from, and ``tensors`` then adds to
    its patterns. A spec is a mapping of :class:`TensorSpec`'s fields, or the format alone, or ``float``.

    Raises:
        UserError: for a missing or damaged file, an unknown key, or a value that makes no sense.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the scheme file {path}: {str(error).splitlines()[0]}") from error
    known = [field.name for field in fields(Scheme)]
    if not isinstance(values, dict) or not isinstance(values.get("tensors", {}), dict):
        raise UserError(f"{path} must hold a mapping with keys among base, {', '.join(known)}; tensors is one too")
    if unknown := values.keys() - {"base", *known}:
        raise UserError(f"{path}: unknown key {sorted(map(str, unknown))[0]!r}; known are base, {', '.join(known)}")
    try:
        base = find_scheme(values.pop("base")) if "base" in values else Scheme(path.stem.lower())
        tensors = {str(pattern): _read_spec(value) for pattern, value in values.pop("tensors", {}).items()}
        # What overrides a pattern of the base's comes after all of them, as everything that the file says.
        kept = {pattern: spec for pattern, spec in base.tensors.items() if pattern not in tensors}
        return replace(base, **{"name": path.stem.lower(), **values}, tensors={**kept, **tensors})
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def _read_spec(value: Any) -> TensorSpec | None:
    if value == FLOAT:
        return None
    if isinstance(value, dict):
        known = [field.name for field in fields(TensorSpec)]
        if unknown := value.keys() - set(known):
            raise UserError(f"unknown key {sorted(map(str, unknown))[0]!r} of a tensor; known are {', '.join(known)}")
        return TensorSpec(**value)
    return TensorSpec(value)


def write_scheme(scheme: Scheme, path: Path) -> None:
    """Write a scheme as YAML that :func:`read_scheme` reads to an equal one."""
    defaults = asdict(TensorSpec("int8"))
    tensors: dict[str, Any] = {}
    for pattern, spec in scheme.tensors.items():
        values = {} if spec is None else {k: v for k, v in asdict(spec).items() if k == "format" or v != defaults[k]}
        tensors[pattern] = values or FLOAT
    content = {field.name: getattr(scheme, field.name) for field in fields(Scheme)}
    content |= {"tensors": tensors, "smooth": dict(scheme.smooth)}
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=120))


def main() -> None:
    """List the shipped schemes."""
    for scheme in SCHEMES.values():
        print(f"{scheme.name:<26} {scheme.summary}")


if __name__ == "__main__":
    main()
