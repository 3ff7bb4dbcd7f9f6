"""Rank of attention maps: the number of directions over which a head mixes the tokens.

The measure of the iLLaMA paper (arXiv 2404.06773, analysis of attention maps): a map's singular values, normalized to
sum to one, in descending order, and the index at which their cumulative sum reaches 0.8. In the paper's curves it is
about 129 of 197 for iLLaMA-T and about 81 for a bidirectional ViT-T (first layer, first head). The paper's released
code takes the rank of the MEAN map of 30 images, which differs from the mean of 30 ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from illama import ILLaMA
from illama.markdown_table import markdown
from illama.models.attention import MaskedAttention
from illama.models.hooks import input_hooks

_BATCH = 8  # the maps of one layer of Base at 384 pixels then take 0.25 GB in float64


def attention_rank(model: ILLaMA, images: Tensor, threshold: float = 0.8) -> np.ndarray:
    """Returns the rank of each head's mean attention map (the probabilities after the mask) over ``images``.

    A copy of the model runs in evaluation mode, with the soft mask it has, in attention's plain form, which has every
    row of every map.

    Args:
        images: (B, C, H, W), at least one, on the model's device.
        threshold: share of the sum of the singular values, in (0, 1].

    Returns:
        (layers, heads), float64, from 1 to N, the number of tokens.

    Raises:
        ValueError: there are no images, or the threshold is outside (0, 1].
    """
    if not len(images):
        raise ValueError("attention_rank needs at least one image")
    model = copy.deepcopy(model).eval()
    model.readout_only = False
    model.set_attention_form("plain")
    points = [f"{name}.p" for name, each in model.named_modules() if isinstance(each, MaskedAttention)]
    sums: dict[str, Any] = dict.fromkeys(points, 0.0)

    def add(name: str, inputs: Any) -> None:
        sums[name] += inputs[0].double().sum(0)

    with input_hooks(model, points, add), torch.no_grad():
        for batch in images.split(_BATCH):
            model(batch)
    means = torch.stack(list(sums.values())) / len(images)
    return map_rank(means, threshold).double().cpu().numpy()


def map_rank(maps: Tensor, threshold: float = 0.8) -> Tensor:
    """Returns how many of the largest singular values sum to ``threshold`` of all: (..., M, N) -> (...), int64.

    Raises:
        ValueError: the threshold is outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], not {threshold}")
    sums = torch.linalg.svdvals(maps.double()).cumsum(-1)
    # The margin absorbs rounding: four of five equal values are 0.8 of their sum, which float64 may miss.
    return (sums < (threshold - 1e-9) * sums[..., -1:]).sum(-1) + 1


def rank_table(ranks: np.ndarray) -> str:
    """Returns a row for each layer of ``ranks`` (layers, heads), and one for all layers."""
    lines = [(str(layer), *_summary(heads)) for layer, heads in enumerate(ranks, 1)]
    return markdown(("layer", "rank, mean of the heads", "smallest", "largest"), [*lines, ("all", *_summary(ranks))])


def _summary(ranks: np.ndarray) -> tuple[str, str, str]:
    return f"{ranks.mean():.1f}", f"{ranks.min():.0f}", f"{ranks.max():.0f}"
