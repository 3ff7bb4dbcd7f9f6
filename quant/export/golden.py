"""Makes the golden answers of a bundle (:mod:`illama.golden_answers`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illama.data.preprocessing import Preprocessing
from illama.golden_answers import (
    MAX_POSITIONS,
    Arithmetic,
    GoldenAnswers,
    GoldenFacts,
    golden_size,
    relative_error,
    to_inputs,
)
from illama.inference import torch_infer
from illama.models.attention import MaskedNetwork
from illama.progress import track

_COUNT = 8
# The smallest tolerances, for a float network and for a quantized one, in which rounding to steps enlarges differences.
_SMALLEST: dict[Arithmetic, float] = {"float32": 0.01, "bfloat16": 0.04, "tensorrt": 0.02}
_QUANTIZED = 0.04
_TIMES = 3.0  # tolerance over the error of rounding in PyTorch; docs/engines.md compares it with the errors of runtimes
_LARGEST = 0.5


def golden_answers(
    model: MaskedNetwork, preprocessing: Preprocessing, batches: Sequence[Tensor], quantized: bool
) -> GoldenAnswers:
    """Returns golden answers of a network as it is exported.

    A runtime adds in another order than PyTorch. In a quantized network, a few values then round to the next step, and
    this grows from block to block. So the tolerances are 3 times the error of PyTorch itself when the results of
    all layers are rounded to half precision. That of float16 bounds the differences of float32, which grow as much.

    Args:
        batches: calibration images (B, C, H, W), normalized, to take the images from; noise is used without them.
        quantized: whether ``model`` is quantized.
    """
    images = _from_calibration(batches, preprocessing) if batches else _noise(preprocessing)
    facts = GoldenFacts(
        "calibration" if batches else "noise", preprocessing.size, preprocessing.mean, preprocessing.std, {}
    )
    inputs = to_inputs(images, facts)
    logits = torch_infer(model)(inputs).reshape(_COUNT, -1)
    stored = min(logits.shape[1], MAX_POSITIONS)
    positions = np.linspace(0, logits.shape[1] - 1, stored).round().astype(np.int64)
    logits = np.ascontiguousarray(logits[:, positions])
    errors = {}
    for dtype in track((torch.float16, torch.bfloat16), "golden answers", "dtype"):
        with _rounding(model, dtype):
            rounded = torch_infer(model)(inputs).reshape(_COUNT, -1)[:, positions]
        errors[dtype] = relative_error(rounded, logits)
    tolerances = {
        key: min(max(low, _TIMES * errors[torch.bfloat16 if key == "bfloat16" else torch.float16]), _LARGEST)
        for key, low in (dict.fromkeys(_SMALLEST, _QUANTIZED) if quantized else _SMALLEST).items()
    }
    return GoldenAnswers(images, positions, logits, replace(facts, tolerances=tolerances))


@contextmanager
def _rounding(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Rounds the float results of all modules to a half-precision dtype, within its range."""
    largest = torch.finfo(dtype).max

    def rounded(module: nn.Module, inputs: Any, result: Any) -> Any:
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            return result.clamp(-largest, largest).to(dtype).float()
        return result

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_hook(rounded).remove)
        yield


def _from_calibration(batches: Sequence[Tensor], preprocessing: Preprocessing) -> np.ndarray:
    """Returns evenly spaced calibration images, made smaller by averaging, as (n, h, w, channels) uint8."""
    images = torch.cat(list(batches))
    chosen = images[np.linspace(0, len(images) - 1, _COUNT).round().astype(int)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    small = F.adaptive_avg_pool2d(chosen * std + mean, golden_size(preprocessing.size))
    return (small * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def _noise(preprocessing: Preprocessing) -> np.ndarray:
    """Returns images of coarse and fine noise, of which each has its own colors and contrast, so that logits differ."""
    random = np.random.default_rng(0)
    shape = (*golden_size(preprocessing.size), preprocessing.in_channels)
    fine = random.random((_COUNT, *shape)) * random.random((_COUNT, 1, 1, shape[-1]))
    coarse = random.random((_COUNT, 4, 4, shape[-1])).repeat(8, axis=1).repeat(8, axis=2)[:, : shape[0], : shape[1]]
    return ((fine + coarse) / 2 * 255).astype(np.uint8)
