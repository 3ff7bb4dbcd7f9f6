"""Slices through the loss landscape along filter-normalised random directions (Li et al., arXiv 1712.09913).

A direction is Gaussian noise in which every filter (a kernel of a convolution, a row of a Linear) is scaled to
the norm of the network's own filter, so that networks with weights of different sizes can be compared.
Biases and the weights of norms are not moved. A table of embeddings, (1, N, width), counts as one filter.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Direction = dict[str, Tensor]
_IMAGES_AT_ONCE = 256


def loss_landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
    dimensions: Literal[1, 2] = 2,
) -> np.ndarray:
    """Mean cross-entropy at ``points`` places from -radius to radius along each of one or two random directions.

    The model is evaluated, not trained; it is left as it was, its weights untouched.

    Args:
        images: (n, C, H, W), on the model's device.
        labels: (n,) classes, or (n, classes) probabilities.
        radius: in units of the directions; at 1 every filter is moved by its own norm.
        points: odd, so that the middle one is the network itself.
        seed: of the directions; the same seed gives the same directions on every device.

    Returns:
        (points,) or (points, points), float64: nats per image; the first axis is the first direction.

    Raises:
        ValueError: for an even or non-positive number of points, no images, or labels of another number.
    """
    if points < 1 or points % 2 == 0:
        raise ValueError(f"points must be odd and positive, not {points}")
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    generator = torch.Generator().manual_seed(seed)
    directions = [filter_normalised_direction(model, generator) for _ in range(dimensions)]
    steps = np.linspace(-radius, radius, points)
    losses = np.empty((points,) * dimensions)
    training = model.training
    model.eval()
    try:
        for index in np.ndindex(losses.shape):
            weights = _moved(model, directions, steps[list(index)])
            losses[index] = _mean_loss(model, weights, images, labels)
    finally:
        model.train(training)
    return losses


def filter_normalised_direction(model: nn.Module, generator: torch.Generator) -> Direction:
    """One random direction: for every parameter of two axes and more, filters of the norms of the model's own."""
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            weight = parameter.detach().flatten(1)
            noise = torch.randn(weight.shape, generator=generator).to(weight)  # on the CPU: alike on every device
            noise *= weight.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
            direction[name] = noise.view_as(parameter)
    return direction


def sharpness(losses: np.ndarray) -> float:
    """The largest rise of the loss in a slice of :func:`loss_landscape`, in percent of 1 + the loss in its middle.

    Equation 4 of Keskar et al. (arXiv 1609.04836), with the slice's random directions and its box: the largest
    value over a slice, and so a lower bound of theirs, which is over the whole neighbourhood.
    """
    middle = losses[tuple(size // 2 for size in losses.shape)]
    return float((losses.max() - middle) / (1 + middle) * 100)


def _moved(model: nn.Module, directions: list[Direction], steps: np.ndarray) -> dict[str, Tensor]:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for direction, step in zip(directions, steps, strict=True):
        for name, change in direction.items():
            weights[name] = weights[name] + float(step) * change
    return weights


@torch.no_grad()
def _mean_loss(model: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    total = 0.0
    for batch, targets in zip(images.split(_IMAGES_AT_ONCE), labels.split(_IMAGES_AT_ONCE), strict=True):
        # The weights are lent to the call and never written to the model, so nothing has to be restored.
        logits = functional_call(model, weights, (batch,)).double()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
    return total / len(images)
