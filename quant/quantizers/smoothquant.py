"""SmoothQuant: migrates outliers of activation channels into weights (arXiv 2211.10438).

Input channel j of a Linear is divided by s_j, and column j of its weight is multiplied by it. The output stays the
same, but the input is easier to quantize. The division is folded into the operator that computes the channel:

    attn.qkv, mlp.fc1, mlp.fc3   into the weight (and bias) of the norm before them
    mlp.fc2 of a SwiGLU          into fc3, whose output is a factor of the product
    attn.proj                    into the rows of qkv that compute v: attention mixes tokens, not channels
    mlp.fc2 and attn.proj        into the weight (and bias) of a norm in front of them, if there is one

Otherwise, fc2 of a ViT's MLP is not rescaled, because the GELU between fc1 and fc2 is not linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from illama.models.attention import part_before_proj
from illama.models.hooks import input_hooks
from illama.progress import track
from quant.schemes.scheme import Scheme


@dataclass(frozen=True)
class _Site:
    """Linears that share an input, and the module whose outputs, from ``first`` on, are the channels of that input."""

    linears: tuple[str, ...]
    module: Any
    first: int = 0

    def divide(self, s: Tensor) -> None:
        """Divides the channels of the input."""
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        weight[self.first :].div_(s.reshape(-1, *[1] * (weight.ndim - 1)))
        if bias is not None:
            bias[self.first :].div_(s)


@torch.no_grad()
def smooth(model: nn.Module, scheme: Scheme, batches: Iterable[Tensor]) -> None:
    """Rescales ``model`` in place wherever the scheme smooths and quantizes an input; the output stays the same.

    The strength is alpha of equation 4: 0 equalizes the channels of the weights, 1 those of the input.
    """
    sites = [
        site
        for name, block in model.named_modules()
        for site in _sites(name, block)
        if _strength(scheme, site) is not None and scheme.spec(f"{site.linears[0]}.input")
    ]
    ranges = _channel_ranges(model, [site.linears[0] for site in sites], batches)
    for site in sites:
        layers: list[Any] = [model.get_submodule(name) for name in site.linears]
        weights = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
        inputs = ranges[site.linears[0]]
        strength = _strength(scheme, site) or 0.0
        s = inputs.clamp(min=1e-5) ** strength / weights.clamp(min=1e-5) ** (1 - strength)
        s = torch.where(inputs > 0, s.clamp(min=1e-4), torch.ones_like(s))
        for layer in layers:
            layer.weight.mul_(s)
        site.divide(s)


def _strength(scheme: Scheme, site: _Site) -> float | None:
    """Returns the strength of a site's first Linear that the scheme smooths; it applies to all of the site."""
    strengths = [scheme.strength(linear) for linear in site.linears]
    return next((strength for strength in strengths if strength is not None), None)


def _channel_ranges(model: nn.Module, linears: list[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Returns the largest magnitude of every input channel of the Linears named."""
    ranges: dict[str, Tensor] = {}

    def note(name: str, inputs: Any) -> None:
        amax = inputs[0].abs().flatten(0, -2).amax(0)
        ranges[name] = torch.maximum(ranges[name], amax) if name in ranges else amax

    with input_hooks(model, linears, note):
        for images in track(batches, "smooth", "batch"):
            model(images)
    return ranges


def _sites(name: str, block: Any) -> Iterator[_Site]:
    """Yields the Linears of one block, ours or timm's, whose input can be divided."""
    if not all(hasattr(block, part) for part in ("norm1", "attn", "norm2", "mlp")):
        return
    attn, mlp = block.attn, block.mlp
    gated = isinstance(getattr(mlp, "fc3", None), nn.Linear)
    before = not isinstance(block, ResPostBlock)  # has its norms after attention and MLP
    if before and _scales(block.norm1) and getattr(attn, "gate", None) is None:  # a gate reads the norm's output too
        yield _Site((f"{name}.attn.qkv",), block.norm1)
    if _scales(getattr(attn, "norm", None)):
        yield _Site((f"{name}.attn.proj",), attn.norm)
    elif part_before_proj(attn) == "":
        yield _Site((f"{name}.attn.proj",), attn.qkv, 2 * attn.proj.in_features)
    if before and _scales(block.norm2) and isinstance(getattr(mlp, "fc1", None), nn.Linear):
        yield _Site(tuple(f"{name}.mlp.{fc}" for fc in (("fc1", "fc3") if gated else ("fc1",))), block.norm2)
    if _scales(getattr(mlp, "norm", None)):
        yield _Site((f"{name}.mlp.fc2",), mlp.norm)
    elif gated and isinstance(mlp.norm, nn.Identity):
        yield _Site((f"{name}.mlp.fc2",), mlp.fc3)


def _scales(norm: nn.Module | None) -> bool:
    return isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.weight is not None
