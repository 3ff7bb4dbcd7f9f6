"""Schemes, calibration, quantized layers and the export to ONNX.

:func:`quantize` does for a network in memory what ``python quant/ptq.py`` does for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from illama.data.preprocessing import Preprocessing

__all__ = ["quantize"]


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    scheme: str = "int8",
    out: str | Path = "runs/quantized",
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """Quantizes a network after training and writes its bundle, and those of the float references, into a folder.

    Args:
        model: an iLLaMA, or a timm VisionTransformer or Eva; it is not changed.
        loader: batches of calibration images (B, C, H, W) float32 as the network takes them, alone or as (images,
            labels), such as a DataLoader's. The first 512 images are used; labels are not.
        scheme: name of a shipped scheme (``python quant/list_schemes.py``), or path to a YAML file.
        out: folder of the bundles, ``fp32``, ``fp16`` and one named after the scheme; an earlier result is replaced.
        preprocessing: how an image file becomes an input, for predictions, serving and evaluation. Defaults to timm's
            for a timm network, and to ImageNet's.
        classes: names of the classes, in the order of the logits. Defaults to their numbers.

    Returns:
        The bundle of the scheme: ``out/SCHEME``.

    Raises:
        UserError: the network or the scheme is not supported, they do not fit each other, or ``loader`` yields nothing
            that the network takes.
    """
    from quant.export.in_memory import write_bundles_of

    return write_bundles_of(model, loader, scheme, Path(out), preprocessing, tuple(classes))
