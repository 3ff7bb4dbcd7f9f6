"""Normalization layers that compute in float32, since the square of a float16 activation can overflow."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from illama.models.config import ModelConfig

EPSILON = 1e-6


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467, equation 4), any leading shape."""

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm for ViTs, with or without weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if each is None else _widen(each) for each in (self.weight, self.bias))
        return F.layer_norm(_widen(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class GroupNormAct(nn.GroupNorm):
    """GroupNorm and an activation, for the ResNet of timm's hybrids: (B, C, H, W) -> (B, C, H, W)."""

    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        wide = F.group_norm(_widen(x), self.num_groups, _widen(self.weight), _widen(self.bias), self.eps)
        return self.act(wide.to(x.dtype))


def make_norm(config: ModelConfig) -> nn.Module:
    """Returns the normalization layer of a config."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.width, eps=EPSILON)


def widened(norm: nn.Module) -> nn.Module | None:
    """Returns a float32 version of a timm normalization with the same parameters; None for any other module."""
    if type(norm) in (nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNormFp32):
        wide: nn.Module = LayerNorm(norm.normalized_shape, eps=norm.eps)  # type: ignore[arg-type]
        wide.bias = norm.bias
    elif type(norm) in (timm.layers.RmsNorm, timm.layers.RmsNormFp32) and norm.weight is not None:
        wide = RMSNorm(norm.normalized_shape, eps=norm.eps)  # type: ignore[arg-type]
    elif type(norm) is timm.layers.GroupNormAct:
        wide = GroupNormAct(norm.num_groups, norm.num_channels, norm.eps)
        wide.act, wide.bias = norm.act, norm.bias
    else:
        return None
    wide.weight = norm.weight
    return wide.train(norm.training)


@torch.fx.wrap  # symbolic tracing cannot follow what depends on device and dtype
def _rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    wide, weight = _widen(x), _widen(weight)
    # In uncompiled training on a CPU, PyTorch's RMSNorm makes a dozen passes over memory.
    by_hand = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if by_hand:
        return _TrainedRMSNorm.apply(wide, weight, eps).to(x.dtype)
    return F.rms_norm(wide, weight.shape, weight, eps).to(x.dtype)


@torch.fx.wrap
def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _TrainedRMSNorm(torch.autograd.Function):
    """RMSNorm whose backward pass reads memory twice; supports first derivatives only."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # float32 under autocast, too
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1] + eps).rsqrt().unsqueeze(-1)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        unit, scale, weight = ctx.saved_tensors
        along = grad * unit
        share = (along @ weight / -unit.shape[-1]).unsqueeze(-1)
        return (grad * weight).addcmul_(unit, share).mul_(scale), along.flatten(0, -2).sum(0), None
