"""Subtracts from the keys of attention their mean, which the softmax does not see, before they are quantized.

With k - c instead of k, every score of a query q changes by the same q c, and the softmax by nothing, with any mask.
In a pretrained ViT, the mean of k is often larger than what differs between tokens, so that rounding changes the scores
much. The mean is subtracted from the bias of qkv, at no cost. RoPE or a norm of the keys after that bias would change
it, so networks with them are left as they are: it would take one more addition in every block there. (Tried on the
shipped iLLaMA, it is not worth that: its keys have a small mean, and the SQNR hardly changes.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from illama.models.attention import MaskedNetwork, attentions
from illama.progress import track
from quant.quantizers.layers import input_hooks
from quant.schemes.scheme import Scheme


@torch.no_grad()
def center_keys(model: MaskedNetwork, scheme: Scheme, batches: Sequence[Tensor]) -> None:
    """Centers the keys of every attention that allows it and whose keys ``scheme`` quantizes, in place.

    Args:
        batches: calibration images (B, C, H, W); the mean is of all their tokens.
    """
    found = {name: each for name, each in _plain_keys(model).items() if scheme.spec(f"{name}.core.k")}
    if not found:
        return
    means: dict[str, list[Tensor]] = {f"{name}.core": [] for name in found}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: means[name].append(inputs[1].double().mean((0, 2)))  # k is (B, heads, N, head_dim)

    with input_hooks(model, {name: note(name) for name in means}):
        for images in track(batches, "center keys", "batch"):
            model(images)
    for name, attention in found.items():
        width = attention.proj.in_features
        attention.qkv.bias[width : 2 * width] -= torch.stack(means[f"{name}.core"]).mean(0).flatten()


def _plain_keys(model: MaskedNetwork) -> dict[str, Any]:
    """Returns the attentions whose keys are computed by qkv and its bias alone."""
    if getattr(model.config, "position", "learnable") != "learnable":
        return {}
    return {
        name: attention
        for name, attention in attentions(model).items()
        if attention.qkv.bias is not None and isinstance(getattr(attention, "k_norm", nn.Identity()), nn.Identity)
    }
