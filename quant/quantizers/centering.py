"""Subtracts from the keys and the values of attention their means before they are quantized, where this is exact.

    keys     With k - c instead of k, every score of a query q changes by the same q c, and the softmax by nothing, with
             any mask. In a pretrained ViT, the mean of k is often larger than what differs between tokens, so that
             rounding changes the scores much.
    values   Where the weights of attention sum to 1, attention of v - c is that of v, minus c, and the bias of proj
             takes W c. Rounded weights do not sum to 1: those of 8 bits are 0 for most of several hundred tokens. The
             error is then a multiple of the mean of v, which is large in a pretrained ViT, unless it is subtracted.

Both means are subtracted from the bias of qkv, at no cost. RoPE or a norm of the keys after that bias would change the
keys' mean, so the keys of such networks are left as they are: it would take one more addition in every block. (Tried on
the shipped iLLaMA, it is not worth that: its keys have a small mean, and the SQNR hardly changes.) Values are left as
they are if a norm or a gate is in front of proj, or if the mask is multiplied after the softmax, since weights do not
sum to 1 then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from illama.models.attention import MaskedNetwork, attentions, part_before_proj
from illama.models.hooks import input_hooks
from illama.progress import track
from quant.schemes.scheme import Scheme


@torch.no_grad()
def center(model: MaskedNetwork, scheme: Scheme, batches: Sequence[Tensor]) -> None:
    """Centers the keys and values that ``scheme`` quantizes, of every attention that allows it, in place.

    Args:
        batches: calibration images (B, C, H, W); the means are of all their tokens.
    """
    parts = {
        name: [each for each in _free_parts(model, attention) if scheme.spec(f"{name}.core.{each}")]
        for name, attention in attentions(model).items()
    }
    means: dict[tuple[str, str], list[Tensor]] = {(name, part): [] for name in parts for part in parts[name]}
    if not means:
        return

    def note(core: str, inputs: Any) -> None:
        name = core.removesuffix(".core")
        for part in parts[name]:
            tensor = inputs["qkv".index(part)]  # (B, heads, N, head_dim)
            means[name, part].append(tensor.double().mean((0, 2)).flatten())

    with input_hooks(model, [f"{name}.core" for name in parts], note):
        for images in track(batches, "center keys and values", "batch"):
            model(images)
    for (name, part), found in means.items():
        _subtract(attentions(model)[name], part, torch.stack(found).mean(0))


def _free_parts(model: MaskedNetwork, attention: Any) -> str:
    """Returns "k", "v", both or neither: what is computed by qkv and its bias alone, and may be shifted."""
    if attention.qkv.bias is None:
        return ""
    turned = getattr(attention, "rotation", None) is not None  # by RoPE, after the bias
    turned |= getattr(model.config, "position", "learnable") != "learnable"
    plain_keys = not turned and isinstance(getattr(attention, "k_norm", nn.Identity()), nn.Identity)
    plain_values = model.config.mask != "post_softmax" and not part_before_proj(attention)
    return "k" * plain_keys + "v" * plain_values


def _subtract(attention: Any, part: str, mean: Tensor) -> None:
    """Subtracts ``mean`` (C,) from the keys or values, and adds what that takes from the output of values."""
    start = "qkv".index(part) * len(mean)
    attention.qkv.bias[start : start + len(mean)] -= mean
    if part == "v":
        if attention.proj.bias is None:
            attention.proj.bias = nn.Parameter(torch.zeros_like(attention.proj.weight[:, 0]))
        attention.proj.bias += (attention.proj.weight.double() @ mean).to(attention.proj.bias.dtype)
